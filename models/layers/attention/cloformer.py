"""Context-aware local attention beside pooled global attention, in groups of heads.

CloFormer: Rethinking Local Perception in Lightweight Vision Transformer, arXiv 2303.17803.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import DropPath, attend
from models.layers.attention.ops.shared import window_means
from models.layers.explained import PlaneMap, Query, View, split_heads
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Rethinking Local Perception in Lightweight Vision Transformer (CloFormer), arXiv 2303.17803"


@register("CloAttention", "EfficientAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class CloAttention(nn.Module):
    """CloFormer's attention on (B, C, H, W) maps: AttnConv in some heads, attention to a pooled map in the others (section 3.2).

    A local branch projects and convolves to q, k, v and gives tanh(act(q ⊙ k) / sqrt(d)) ⊙ v; its weights depend on the content and are
    shared by no position. The global branch attends from every pixel to the average of each ``window_size`` x ``window_size`` window.

    Differences from the published module: windows cut by the border are kept, with the mean of their pixels (the published code drops
    those pixels, and fails for most sizes), and a branch without heads may be anywhere in ``group_split``.

    Args:
        dim: channels in and out.
        num_heads: heads over all branches.
        group_split: heads of each local branch, then of the global one; they sum to ``num_heads``. None: one half local, one half global
            (several kernels divide the local half evenly).
        kernel_sizes: kernel of each local branch, odd.
        window_size: pooling window of the global branch, px of the map.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout after the projection.
        qkv_bias: biases of all projections.

    Raises:
        ValueError: heads that do not divide ``dim``, or a split that does not fit heads or kernels.
    """

    below_one = ("group_split",)  # a branch without heads

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        group_split: Sequence[int] | None = None,
        kernel_sizes: Sequence[int] = (5,),
        window_size: int = 7,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        split = _even_split(num_heads, len(kernel_sizes)) if group_split is None else tuple(group_split)
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        if len(split) != len(kernel_sizes) + 1 or sum(split) != num_heads:
            raise ValueError(f"group_split {list(split)} should have {len(kernel_sizes) + 1} entries that sum to {num_heads} heads")
        self.dim, self.num_heads, self.window_size = dim, num_heads, window_size
        self.dim_head = dim // num_heads
        self.scale = self.dim_head**-0.5
        self.global_heads = split[-1]
        if self.global_heads:
            width = self.global_heads * self.dim_head
            self.global_q = nn.Conv2d(dim, width, 1, bias=qkv_bias)
            self.global_kv = nn.Conv2d(dim, 2 * width, 1, bias=qkv_bias)
        branches = [(heads * self.dim_head, kernel) for heads, kernel in zip(split, kernel_sizes) if heads]
        self.convs = nn.ModuleList(nn.Conv2d(3 * c, 3 * c, k, padding=k // 2, groups=3 * c) for c, k in branches)
        self.act_blocks = nn.ModuleList(_ActBlock(c) for c, _ in branches)
        self.qkvs = nn.ModuleList(nn.Conv2d(dim, 3 * c, 1, bias=qkv_bias) for c, _ in branches)
        self.proj = nn.Conv2d(dim, dim, 1, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        parts = [self._local(x, *layers) for layers in zip(self.qkvs, self.convs, self.act_blocks)]
        if self.global_heads:
            parts.append(self._global(x))
        return self.proj_drop(self.proj(torch.cat(parts, dim=1)))

    def _local(self, x: Tensor, project: nn.Module, mix: nn.Module, act: nn.Module) -> Tensor:
        weights, value = self._local_weights(x, project, mix, act)
        return self.attn_drop(weights) * value

    def _local_weights(self, x: Tensor, project: nn.Module, mix: nn.Module, act: nn.Module) -> tuple[Tensor, Tensor]:
        """Weights in -1 … 1 and the value that they multiply: each (B, heads d, H, W)."""
        query, key, value = mix(project(x)).chunk(3, dim=1)
        return torch.tanh(act(query * key) * self.scale), value

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """The local weights of each branch, and what a pixel and all pixels attend to in the pooled map."""
        views = []
        for project, mix, act in zip(self.qkvs, self.convs, self.act_blocks):
            weights, _ = self._local_weights(x, project, mix, act)
            side = cast(nn.Conv2d, mix).kernel_size[0]
            views.append(PlaneMap(f"local weights, {side}×{side}: mean magnitude", weights[0].abs().mean(0)))
            views.append(PlaneMap(f"local weights, {side}×{side}: mean", weights[0].mean(0), signed=True))
        if self.global_heads:
            queries, keys = (split_heads(part, self.global_heads) for part in (self.global_q(x), self._global_kv(x)[0]))
            weights = (self.scale * queries @ keys.transpose(1, 2)).softmax(2).mean(0)  # (N, M)
            rows, columns = (-(-side // self.window_size) for side in x.shape[2:])
            reach = (rows * self.window_size / x.shape[2], columns * self.window_size / x.shape[3])
            one = weights[query.cell_number(x.shape[2], x.shape[3])]
            for title, values, at_query in (("of the query", one, True), ("of all queries, mean", weights.mean(0), False)):
                views.append(PlaneMap(f"global attention {title}", values.unflatten(0, (rows, columns)), at_query=at_query, reach=reach))
        return tuple(views)

    def _global_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of the pooled map."""
        pooled = x if self.window_size == 1 else window_means(x, self.window_size)
        key, value = self.global_kv(pooled).chunk(2, dim=1)
        return key, value

    def _global(self, x: Tensor) -> Tensor:
        key, value = self._global_kv(x)
        drop = self.attn_drop.p if self.training else 0.0
        return attend(self.global_q(x), key, value, heads=self.global_heads, scale=self.scale, dropout=drop)


@register("ConvFFN", "CloConvFFN", channels=rules.same_width, kind="attention", paper=PAPER)
class ConvFFN(nn.Module):
    """CloFormer's feed-forward: 1x1 convolution, GELU, depthwise convolution, 1x1 convolution; no residual inside.

    Args:
        in_channels: channels in.
        hidden_channels: width between; None for four times ``in_channels``.
        kernel_size: kernel of the depthwise convolution, odd.
        stride: its stride.
        out_channels: channels out; None for ``in_channels`` (a YAML row keeps its width).
        drop_out: dropout at the end.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | None = None,
        kernel_size: int = 5,
        stride: int = 1,
        out_channels: int | None = None,
        drop_out: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = hidden_channels or 4 * in_channels
        self.fc1 = nn.Conv2d(in_channels, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, kernel_size, stride, kernel_size // 2, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, out_channels or in_channels, 1)
        self.drop = nn.Dropout(drop_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""
        return self.drop(self.fc2(self.dwconv(F.gelu(self.fc1(x)))))


@register("CloBlock", channels=rules.same_width, kind="attention", paper=PAPER)
class CloBlock(nn.Module):
    """CloFormer's block: x + attention(norm(x)), then down(x) + ConvFFN(norm(x)); the norms are over the whole image (one group).

    ``down`` is the identity at stride 1; at stride 2 it is a convolution of stride 2, batch norm and a 1x1 convolution.

    Args:
        dim: channels in.
        out_dim: channels out, may differ from ``dim`` only at stride 2; None for ``dim``.
        num_heads: see CloAttention.
        group_split: see CloAttention.
        kernel_sizes: see CloAttention.
        window_size: see CloAttention.
        mlp_kernel_size: kernel of ConvFFN, and of ``down``.
        mlp_ratio: hidden width of ConvFFN, in multiples of ``dim``.
        stride: 1 or 2.
        attn_drop: dropout of the attention weights.
        mlp_drop: dropout after attention and ConvFFN.
        qkv_bias: biases of the attention's projections.
        drop_path: rate of stochastic depth.

    Raises:
        ValueError: another width at stride 1, or a stride that is neither 1 nor 2.
    """

    below_one = ("group_split",)

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        num_heads: int = 8,
        group_split: Sequence[int] | None = None,
        kernel_sizes: Sequence[int] = (5,),
        window_size: int = 7,
        mlp_kernel_size: int = 5,
        mlp_ratio: float = 4.0,
        stride: int = 1,
        attn_drop: float = 0.0,
        mlp_drop: float = 0.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        out_dim = out_dim or dim
        if stride not in (1, 2) or (stride == 1 and out_dim != dim):
            raise ValueError(f"stride {stride} with {dim} -> {out_dim} channels: stride is 1 or 2, and at 1 the width stays")
        self.norm1 = nn.GroupNorm(1, dim)
        self.attn = CloAttention(dim, num_heads, group_split, kernel_sizes, window_size, attn_drop, mlp_drop, qkv_bias)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.GroupNorm(1, dim)
        self.downsample = nn.Identity() if stride == 1 else _down(dim, out_dim, mlp_kernel_size)
        self.mlp = ConvFFN(dim, int(dim * mlp_ratio), mlp_kernel_size, stride, out_dim, mlp_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, out_dim, ceil(H / stride), ceil(W / stride))."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return self.downsample(x) + self.drop_path(self.mlp(self.norm2(x)))


class _ActBlock(nn.Module):
    """The nonlinearity of a local branch: 1x1 convolution, SiLU, 1x1 convolution, key ``act_block``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act_block = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.SiLU(), nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act_block(x)


def _down(dim: int, out_dim: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim, dim, kernel, 2, kernel // 2), nn.BatchNorm2d(dim), nn.Conv2d(dim, out_dim, 1))


def _even_split(heads: int, branches: int) -> tuple[int, ...]:
    """Half of the heads local, divided evenly between the branches, the rest global."""
    local = heads // 2
    return (*(local // branches + (i < local % branches) for i in range(branches)), heads - local)
