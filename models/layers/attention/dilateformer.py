"""Multi-scale dilated attention: each group of heads attends to a 3x3 neighbourhood with a dilation of its own.

DilateFormer: Multi-Scale Dilated Transformer for Visual Recognition, arXiv 2302.01791.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLayerNorm, ChannelLinear, DropPath, Mlp
from models.layers.attention.ops.neighbourhood import Neighbourhood, neighbourhood_attention
from models.layers.attention.ops.shared import depthwise, divisor_up_to
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "DilateFormer: Multi-Scale Dilated Transformer for Visual Recognition, arXiv 2302.01791"
HEAD_CHANNELS = 24  # the paper's


@register("MSDA", "MultiDilatelocalAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class MSDA(nn.Module):
    """Sliding-window dilated attention (equations 1 to 4 of the paper): heads in equal groups, group i with dilation[i].

    Neighbours outside the map are zeros that take part in the softmax, as published. The published code writes its result into its
    input's memory; this one leaves its input alone, and shifts views instead of unfolding.

    Args:
        dim: channels in and out.
        num_heads: heads over all groups; None for about 24 channels a head.
        qkv_bias: a bias in the projection of query, key and value.
        qk_scale: factor of the logits; None for 1 / sqrt(channels a head).
        kernel_size: side of the neighbourhood, odd.
        dilation: one a group; None for the paper's 1, 2, 3 where 3 divides ``dim``, else 1, 2, 3, 4.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout after the projection.

    Raises:
        ValueError: groups, heads and channels do not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        *,
        kernel_size: int = 3,
        dilation: Sequence[int] | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dilation is None:
            dilation = (1, 2, 3) if dim % 3 == 0 else (1, 2, 3, 4)
        groups = len(dilation)
        if num_heads is None:
            num_heads = groups * divisor_up_to(max(1, dim // groups), max(1, dim // (groups * HEAD_CHANNELS)))
        if num_heads % groups or dim % num_heads:
            raise ValueError(f"MSDA: {num_heads} heads should divide {dim} channels, and {groups} dilations the heads")
        self.dilation, self.kernel, self.heads = tuple(dilation), kernel_size, num_heads // groups
        self.scale, self.attn_drop = qk_scale or (dim // num_heads) ** -0.5, attn_drop
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias)
        self.proj = ChannelLinear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        query, key, value = (part.chunk(len(self.dilation), 1) for part in self.qkv(x).chunk(3, 1))
        out = [self._attend(*group) for group in zip(query, key, value, self.dilation)]
        return self.proj_drop(self.proj(torch.cat(out, 1)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, dilation: int) -> Tensor:
        margin = [dilation * (self.kernel // 2)] * 4
        at, drop = Neighbourhood(self.kernel, self.heads, dilation), self.attn_drop if self.training else 0.0
        return neighbourhood_attention(query, F.pad(key, margin), F.pad(value, margin), at, scale=self.scale, dropout=drop)


@register("DilateBlock", channels=rules.same_width, kind="attention", paper=PAPER)
class DilateBlock(nn.Module):
    """DilateFormer's block: x + attention(LN(x)), then x + MLP(LN(x)), on maps.

    Args:
        dim: channels in and out.
        num_heads: see MSDA.
        mlp_ratio: hidden width of the MLP, in multiples of ``dim``.
        qkv_bias: see MSDA.
        qk_scale: see MSDA.
        drop: dropout after the projection and in the MLP.
        attn_drop: see MSDA.
        drop_path: rate of stochastic depth.
        kernel_size: see MSDA.
        dilation: see MSDA.
        cpe_per_block: add a depth-wise 3x3 of the input first (conditional positions).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        *,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        kernel_size: int = 3,
        dilation: Sequence[int] | None = None,
        cpe_per_block: bool = False,
    ) -> None:
        super().__init__()
        self.pos_embed = depthwise(dim, 3) if cpe_per_block else None
        self.norm1 = ChannelLayerNorm(dim)
        self.attn = MSDA(
            dim, num_heads, qkv_bias, qk_scale, kernel_size=kernel_size, dilation=dilation, attn_drop=attn_drop, proj_drop=drop
        )
        self.norm2 = ChannelLayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
