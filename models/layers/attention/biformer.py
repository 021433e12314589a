"""BiFormer's blocks: positional convolution, bi-level routing attention and MLP, each with a residual.

BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.attention.bilevel_routing import PAPER, BiLevelRoutingAttention
from models.layers.attention.bilevel_routing_nchw import BiLevelRoutingAttentionNCHW
from models.layers.attention.ops.common import ChannelLayerNorm, ChannelLinear, DropPath, attend, per_channel
from models.layers.attention.ops.routing import check_heads
from models.layers.attention.ops.shared import depthwise
from models.spec import channel_rules as rules
from models.spec.registry import register

FULL_ATTENTION_HEADS = 8  # the published blocks give their full attention eight heads, whatever num_heads says
Linear = Callable[..., nn.Module]
conv1x1: Linear = partial(nn.Conv2d, kernel_size=1)
NORMS: dict[str, Callable[[int], nn.Module]] = {"LayerNorm2d": partial(ChannelLayerNorm, eps=1e-6), "BatchNorm2d": nn.BatchNorm2d}


@register("BiFormerBlock", channels=rules.same_width, kind="attention", paper=PAPER)
class BiFormerBlock(nn.Module):
    """BiFormer's block: x + pos(x), then x + γ₁ · attention(LN(x)), then x + γ₂ · MLP(LN(x)) (figure 4 of the paper).

    ``topk`` chooses the attention as in the published block: above 0 bi-level routing; 0 a depthwise 5x5 between two 1x1 convolutions;
    -1 full attention; -2 full attention with a depthwise convolution of its input added (LePE). Full attention has eight heads.

    Args:
        dim: channels in and out.
        num_heads: heads of the routed attention.
        topk: see above.
        drop_path: rate of stochastic depth.
        layer_scale_init_value: start of γ₁ and γ₂; not above 0: no γ.
        mlp_ratio: hidden width of the MLP, in multiples of ``dim``.
        mlp_dwconv: a depthwise 3x3 convolution inside the MLP, before its activation.
        side_dwconv: kernel of LePE.
        before_attn_dwconv: kernel of the positional convolution, odd, 0 for none.
        pre_norm: normalise before the branches; else after the sums.
        kv_downsample_mode: how the routed attention downsamples its keys and values.
        routing: further options of BiLevelRoutingAttention.
    """

    below_one = ("topk", "side_dwconv", "before_attn_dwconv")

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        topk: int = 4,
        drop_path: float = 0.0,
        layer_scale_init_value: float = -1.0,
        mlp_ratio: float = 4.0,
        mlp_dwconv: bool = False,
        side_dwconv: int = 5,
        before_attn_dwconv: int = 3,
        pre_norm: bool = True,
        kv_downsample_mode: str = "ada_avgpool",
        **routing: Any,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.pos_embed = depthwise(dim, before_attn_dwconv) if before_attn_dwconv > 0 else None
        self.norm1 = ChannelLayerNorm(dim, eps=1e-6)
        if topk > 0:
            self.attn: nn.Module = BiLevelRoutingAttention(
                dim, num_heads, topk=topk, side_dwconv=side_dwconv, kv_downsample_mode=kv_downsample_mode, **routing
            )
        elif topk == 0:
            self.attn = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim, 1), depthwise(dim, 5), nn.Conv2d(dim, dim, 1))
        else:
            self.attn = FullAttention(dim, side_dwconv=side_dwconv if topk == -2 else 0)
        self.norm2 = ChannelLayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        between = _Depthwise(hidden) if mlp_dwconv else nn.Identity()
        self.mlp = nn.Sequential(ChannelLinear(dim, hidden), between, nn.GELU(), ChannelLinear(hidden, dim))
        self.drop_path = DropPath(drop_path)
        scaled = layer_scale_init_value > 0
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if scaled else None
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = self._residual(x, self.norm1, self.attn, self.gamma1)
        return self._residual(x, self.norm2, self.mlp, self.gamma2)

    def _residual(self, x: Tensor, norm: nn.Module, layer: nn.Module, gamma: Tensor | None) -> Tensor:
        out = layer(norm(x)) if self.pre_norm else layer(x)
        x = x + self.drop_path(out if gamma is None else per_channel(gamma) * out)
        return x if self.pre_norm else norm(x)


@register("BiFormerBlockNCHW", channels=rules.same_width, kind="attention", paper=PAPER)
class BiFormerBlockNCHW(nn.Module):
    """The block of BiFormer's channels-first form: x + attention(norm(x)), then x + MLP(norm(x)), no positional convolution.

    Args:
        dim: channels in and out.
        num_heads: heads of the routed attention.
        n_win: windows a side.
        topk: windows that a window attends to; -1 for full attention (eight heads, LePE on the values).
        mlp_ratio: hidden width of the MLP, in multiples of ``dim``.
        side_dwconv: kernel of LePE.
        drop_path: rate of stochastic depth.
        norm_layer: ``LayerNorm2d``, over the channels of each pixel, or ``BatchNorm2d``, as in the released checkpoint.

    Raises:
        ValueError: another normalisation.
    """

    below_one = ("topk", "side_dwconv")

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        n_win: int = 7,
        topk: int = 4,
        mlp_ratio: float = 4.0,
        side_dwconv: int = 5,
        drop_path: float = 0.0,
        norm_layer: str = "LayerNorm2d",
    ) -> None:
        super().__init__()
        if norm_layer not in NORMS:
            raise ValueError(f"BiFormerBlockNCHW: norm_layer {norm_layer!r} is not one of {', '.join(NORMS)}")
        self.norm1 = NORMS[norm_layer](dim)
        self.attn: nn.Module
        if topk > 0:
            self.attn = BiLevelRoutingAttentionNCHW(dim, num_heads, n_win, topk=topk, side_dwconv=side_dwconv)
        else:
            self.attn = FullAttention(dim, side_dwconv=side_dwconv, linear=conv1x1, lepe_of_value=True)
        self.norm2 = NORMS[norm_layer](dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class FullAttention(nn.Module):
    """Multi-head self-attention over all pixels, with a depthwise convolution added (LePE).

    Args:
        dim: channels in and out, a multiple of ``heads``.
        side_dwconv: kernel of LePE, 0 for none.
        heads: number of heads.
        linear: the pointwise layer, whose parameters have the shape that the published form has.
        lepe_of_value: LePE reads the value; else the module's input.
    """

    def __init__(
        self,
        dim: int,
        *,
        side_dwconv: int = 5,
        heads: int = FULL_ATTENTION_HEADS,
        linear: Linear = ChannelLinear,
        lepe_of_value: bool = False,
    ) -> None:
        super().__init__()
        check_heads(heads, dim, dim)
        self.heads, self.lepe_of_value = heads, lepe_of_value
        self.qkv = linear(dim, 3 * dim, bias=False)
        self.proj = linear(dim, dim)
        self.lepe = depthwise(dim, side_dwconv) if side_dwconv > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        query, key, value = self.qkv(x).chunk(3, dim=1)
        out = attend(query, key, value, heads=self.heads)
        if self.lepe is not None:
            out = out + self.lepe(value if self.lepe_of_value else x)
        return self.proj(out)


class _Depthwise(nn.Module):
    """Depthwise 3x3 convolution under the published key ``dwconv``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = depthwise(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)
