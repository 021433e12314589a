"""Bi-level routing attention: each window of a map first chooses a few windows, then its pixels attend to the pixels of those alone.

BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import (
    ChannelLayerNorm,
    ChannelLinear,
    DropPath,
    attend,
    from_windows,
    full_precision,
    fused_attention,
    pad_to_multiple,
    per_channel,
    take_rows,
    to_windows,
)
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810"
FULL_ATTENTION_HEADS = 8  # the published blocks give their full attention eight heads, whatever num_heads says
KV_MODES = ("identity", "ada_avgpool", "avgpool", "maxpool")

Linear = Callable[..., nn.Module]
conv1x1: Linear = partial(nn.Conv2d, kernel_size=1)


@register("BiLevelRoutingAttention", "BRA", channels=rules.same_width, kind="attention", paper=PAPER)
class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention on (B, C, H, W) maps (section 3.2 of the paper), in its first published form.

    The map is cut into ``n_win`` x ``n_win`` windows. Routing: the means of query and key over each window give the affinity
    A = Q_w K_wᵀ; every window keeps its ``topk`` best. Attention: softmax(scale · q [gathered k]ᵀ) [gathered v], plus a depthwise
    convolution of v (LePE), then ``wo``. The scale is ``qk_dim ** -0.5``, over all heads together, as published.

    Differences from the published module: any map size works (zeros are added to the input below and at the right, and cut off
    again); the window means are projected in float32 (a mean commutes with a projection), so that low precision does not change the
    choice; only the chosen windows are gathered, where the published gather builds all pairs of windows in the backward pass.

    Args:
        dim: channels in and out.
        num_heads: heads of the attention, contiguous groups of channels.
        n_win: windows a side.
        qk_dim: channels of query and key; None for ``dim``.
        qk_scale: factor of the logits; None for ``qk_dim ** -0.5``.
        kv_per_win: keys a side and window, for ``ada_avgpool``.
        kv_downsample_ratio: stride, for ``avgpool`` and ``maxpool``.
        kv_downsample_kernel: their kernel; None for the stride.
        kv_downsample_mode: how keys and values of a window are thinned out: identity, ada_avgpool, avgpool, maxpool.
        topk: windows that a window attends to.
        param_attention: ``qkvo``, or ``qkv`` for no output projection.
        param_routing: a linear layer on the routing descriptors; needs ``soft_routing``, or nothing would train it.
        diff_routing: lets the gradient of the soft weights flow into query and key; needs ``soft_routing``.
        soft_routing: multiplies the gathered windows with the softmax of their routing scores.
        side_dwconv: kernel of the LePE convolution, 0 for none.
        auto_pad: accepted because published calls pass it; maps are always padded where they need it.

    Raises:
        ValueError: widths that the heads do not divide, an unknown mode, or hard differentiable routing, which the paper does not define.
    """

    below_one = ("side_dwconv",)  # options of which numbers below 1 mean something

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        kv_downsample_kernel: int | None = None,
        kv_downsample_mode: str = "identity",
        topk: int = 4,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        side_dwconv: int = 3,
        auto_pad: bool = True,
    ) -> None:
        super().__init__()
        qk_dim = qk_dim or dim
        _check_heads(num_heads, dim, qk_dim)
        if kv_downsample_mode not in KV_MODES:
            raise ValueError(f"kv_downsample_mode {kv_downsample_mode!r} is not one of {', '.join(KV_MODES)}")
        if param_attention not in ("qkvo", "qkv"):
            raise ValueError(f"param_attention {param_attention!r} is neither 'qkvo' nor 'qkv'")
        if (diff_routing or param_routing) and not soft_routing:
            raise ValueError("diff_routing and param_routing need soft_routing: a hard choice has no gradient")
        self.dim, self.qk_dim, self.num_heads, self.n_win = dim, qk_dim, num_heads, n_win
        self.scale = qk_scale or qk_dim**-0.5
        self.topk = min(topk, n_win**2)
        self.soft_routing, self.diff_routing = soft_routing, diff_routing
        self.lepe = _depthwise(dim, side_dwconv) if side_dwconv > 0 else None
        self.router = _Router(qk_dim) if param_routing else None
        self.qkv = _QKV(dim, qk_dim)
        self.wo = ChannelLinear(dim, dim) if param_attention == "qkvo" else nn.Identity()
        self.kv_mode, self.kv_per_win = kv_downsample_mode, kv_per_win
        self.kv_stride = kv_downsample_ratio
        self.kv_kernel = kv_downsample_kernel or kv_downsample_ratio

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        padded = pad_to_multiple(x, self.n_win, self.n_win)
        window = (padded.shape[-2] // self.n_win, padded.shape[-1] // self.n_win)
        pixels = to_windows(padded, *window)  # (B, n², h w, C)
        query, key, value = self.qkv(pixels)
        index, weights = self._route(pixels)
        soft = weights if self.soft_routing else None
        fewer = (self._thin_out(part, *window) for part in (key, value))
        out = routed_attention(query, *fewer, index, heads=self.num_heads, scale=self.scale, weights=soft)
        result = from_windows(out, *window, columns=self.n_win)
        if self.lepe is not None:
            result = result + self.lepe(from_windows(value, *window, columns=self.n_win))
        return self.wo(result)[..., :height, :width]

    def _route(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen windows (B, n², topk), best first, and softmax over their scores (same shape)."""
        with full_precision(pixels):
            means = pixels.float().mean(2)  # (B, n², C)
            query, key = self.qkv.descriptors(means)
            if not self.diff_routing:
                query, key = query.detach(), key.detach()
            if self.router is not None:
                query, key = self.router(query), self.router(key)
            scores, index = torch.topk((query * self.scale) @ key.transpose(1, 2), self.topk, dim=-1)
            return index, scores.softmax(-1)

    def _thin_out(self, windows: Tensor, height: int, width: int) -> Tensor:
        """(B, n², h w, C) -> (B, n², fewer, C)."""
        if self.kv_mode == "identity":
            return windows
        batch, count, _, channels = windows.shape
        if self.kv_mode == "ada_avgpool":
            bins = self.kv_per_win
            rows = adaptive_mean(windows.reshape(batch, count, height, width * channels), height, bins)
            return adaptive_mean(rows.reshape(batch, count, bins, width, channels), width, bins).reshape(batch, count, -1, channels)
        maps = windows.reshape(batch * count, height, width, channels).permute(0, 3, 1, 2)
        pool = F.avg_pool2d if self.kv_mode == "avgpool" else F.max_pool2d
        fewer = pool(maps, self.kv_kernel, self.kv_stride, ceil_mode=True)
        return fewer.flatten(2).transpose(1, 2).reshape(batch, count, -1, channels)


@register("nchwBRA", "BiLevelRoutingAttention_nchw", channels=rules.same_width, kind="attention", paper=PAPER)
class BiLevelRoutingAttentionNCHW(nn.Module):
    """Bi-level routing attention in its second published form, channels first.

    The same attention as BiLevelRoutingAttention with other parameter names (``qkv_linear``, ``output_linear``), and other numbers where
    ``n_win`` does not divide the map: windows have H // n_win by W // n_win pixels, there are as many as it takes, query, key and value
    (not the input) get the zeros, and these take part as keys with logit 0. The scale is ``dim ** -0.5``.

    Differences from the published module: a side smaller than ``n_win`` gives windows of one pixel instead of an error, and the routing is
    decided in float32.

    Args:
        dim: channels in and out.
        num_heads: heads of the attention, contiguous groups of channels.
        n_win: windows a side, at least.
        qk_scale: factor of the logits; None for ``dim ** -0.5``.
        topk: windows that a window attends to.
        side_dwconv: kernel of the LePE convolution, 0 for none.
        auto_pad: accepted because published calls pass it; maps are always padded where they need it.
    """

    below_one = ("side_dwconv",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 3,
        auto_pad: bool = True,
    ) -> None:
        super().__init__()
        _check_heads(num_heads, dim, dim)
        self.dim, self.num_heads, self.n_win, self.topk = dim, num_heads, n_win, topk
        self.scale = qk_scale or dim**-0.5
        self.lepe = _depthwise(dim, side_dwconv) if side_dwconv > 0 else None
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
        self.output_linear = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        window = (_at_least_one(height // self.n_win), _at_least_one(width // self.n_win))
        qkv = self.qkv_linear(x)
        padded = pad_to_multiple(qkv, *window)
        columns = padded.shape[-1] // window[1]
        query, key, value = to_windows(padded, *window).chunk(3, dim=-1)
        out = routed_attention(query, key, value, self._route(x, *window), heads=self.num_heads, scale=self.scale)
        result = from_windows(out, *window, columns=columns)[..., :height, :width]
        if self.lepe is not None:
            result = result + self.lepe(qkv[:, 2 * self.dim :])
        return self.output_linear(result)

    def _route(self, x: Tensor, height: int, width: int) -> Tensor:
        """The chosen windows (B, windows, topk), best first; a window at the border has the mean of its real pixels."""
        with full_precision(x), torch.no_grad():
            ones = torch.ones_like(x[:1, :1], dtype=torch.float32)
            count = to_windows(pad_to_multiple(ones, height, width), height, width).sum(2)
            means = to_windows(pad_to_multiple(x.float(), height, width), height, width).sum(2) / count  # (B, windows, C)
            query, key = _project(means, self.qkv_linear, 2 * self.dim).chunk(2, dim=-1)
            affinity = query @ key.transpose(1, 2)
            return torch.topk(affinity, min(self.topk, affinity.shape[-1]), dim=-1).indices


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
        mlp_dwconv: a depthwise 3x3 convolution (residual) inside the MLP.
        side_dwconv: kernel of LePE.
        before_attn_dwconv: kernel of the positional convolution, odd, 0 for none.
        pre_norm: normalise before the branches; else after the sums.
        kv_downsample_mode: how the routed attention thins out its keys.
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
        self.pos_embed = _depthwise(dim, before_attn_dwconv) if before_attn_dwconv > 0 else None
        self.norm1 = ChannelLayerNorm(dim, eps=1e-6)
        if topk > 0:
            self.attn: nn.Module = BiLevelRoutingAttention(
                dim, num_heads, topk=topk, side_dwconv=side_dwconv, kv_downsample_mode=kv_downsample_mode, **routing
            )
        elif topk == 0:
            self.attn = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim, 1), _depthwise(dim, 5), nn.Conv2d(dim, dim, 1))
        else:
            self.attn = FullAttention(dim, side_dwconv=side_dwconv if topk == -2 else 0)
        self.norm2 = ChannelLayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        between = _ResidualDepthwise(hidden) if mlp_dwconv else nn.Identity()
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
        batch_norm: batch instead of layer normalisation, as in the released checkpoint.
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
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim) if batch_norm else ChannelLayerNorm(dim, eps=1e-6)
        self.attn: nn.Module
        if topk > 0:
            self.attn = BiLevelRoutingAttentionNCHW(dim, num_heads, n_win, topk=topk, side_dwconv=side_dwconv)
        else:
            self.attn = FullAttention(dim, side_dwconv=side_dwconv, linear=conv1x1, lepe_of_value=True)
        self.norm2 = nn.BatchNorm2d(dim) if batch_norm else ChannelLayerNorm(dim, eps=1e-6)
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
        _check_heads(heads, dim, dim)
        self.heads, self.lepe_of_value = heads, lepe_of_value
        self.qkv = linear(dim, 3 * dim, bias=False)
        self.proj = linear(dim, dim)
        self.lepe = _depthwise(dim, side_dwconv) if side_dwconv > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        query, key, value = self.qkv(x).chunk(3, dim=1)
        out = attend(query, key, value, heads=self.heads)
        if self.lepe is not None:
            out = out + self.lepe(value if self.lepe_of_value else x)
        return self.proj(out)


def routed_attention(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, *, heads: int, scale: float, weights: Tensor | None = None
) -> Tensor:
    """Attention of each window's pixels to the pixels of the windows that ``index`` names, all of them in one softmax.

    Args:
        query: (B, P, T, Q), P windows of T pixels.
        key: (B, P, S, Q).
        value: (B, P, S, V).
        index: (B, P, K) windows in 0 … P - 1.
        heads: number of heads, contiguous groups of channels.
        scale: factor of the logits.
        weights: (B, P, K) factors of the gathered keys and values.

    Returns:
        (B, P, T, V).
    """
    batch, windows, pixels, _ = query.shape
    gathered = (_gather(part, index, weights) for part in (key, value))  # (B P, K S, Q) and (B P, K S, V)
    q, k, v = (x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2) for x in (query.flatten(0, 1), *gathered))
    out = fused_attention(q, k, v, scale=scale)  # (B P, heads, T, V / heads)
    return out.transpose(1, 2).reshape(batch, windows, pixels, value.shape[-1])


def _gather(part: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """The windows that each window chose, side by side: (B, P, S, C), (B, P, K) -> (B P, K S, C)."""
    rows = take_rows(part.flatten(2), index.flatten(1))  # (B, P K, S C)
    if weights is not None:
        rows = rows * weights.flatten(1).unsqueeze(-1).to(rows.dtype)
    return rows.reshape(index.shape[0] * index.shape[1], -1, part.shape[-1])


def adaptive_mean(x: Tensor, size: int, bins: int) -> Tensor:
    """Adaptive average pooling along the last dimension but one, as a product with a small matrix.

    The library's own kernel adds atomically in its backward pass and cannot be exported for sizes that are not known.

    Returns:
        (..., n, D) -> (..., bins, D), n = ``size``; bin i is the mean of the entries in [floor(i n / bins), ceil((i + 1) n / bins)).
    """
    place, bin_index = torch.arange(size, device=x.device), torch.arange(bins, device=x.device).unsqueeze(1)
    first = (bin_index * size).div(bins, rounding_mode="floor")
    end = ((bin_index + 1) * size + bins - 1).div(bins, rounding_mode="floor")
    inside = ((place >= first) & (place < end)).to(x.dtype)  # (bins, n)
    return (inside / inside.sum(1, keepdim=True)) @ x


class _QKV(nn.Module):
    """The published container of the joint projection, key ``qkv.qkv``."""

    def __init__(self, dim: int, qk_dim: int) -> None:
        super().__init__()
        self.qk_dim = qk_dim
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(..., C) -> query (..., Q), key (..., Q), value (..., C), each contiguous."""
        sizes = (self.qk_dim, self.qk_dim, self.qkv.in_features)
        return tuple(F.linear(pixels, w, b) for w, b in zip(self.qkv.weight.split(sizes), self.qkv.bias.split(sizes)))

    def descriptors(self, means: Tensor) -> list[Tensor]:
        """Query and key of window means, in float32: (B, P, C) -> two times (B, P, Q)."""
        return list(_project(means, self.qkv, 2 * self.qk_dim).chunk(2, dim=-1))


class _Router(nn.Module):
    """The published container of the routing projection, key ``router.emb``."""

    def __init__(self, qk_dim: int) -> None:
        super().__init__()
        self.emb = nn.Linear(qk_dim, qk_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.emb.weight.float(), self.emb.bias.float())


class _ResidualDepthwise(nn.Module):
    """x + depthwise 3x3 convolution, key ``dwconv``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = _depthwise(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dwconv(x)


def _project(means: Tensor, layer: nn.Linear | nn.Conv2d, rows: int) -> Tensor:
    """The first ``rows`` outputs of a pointwise layer, in float32: (..., C) -> (..., rows)."""
    bias = None if layer.bias is None else layer.bias[:rows].float()
    return F.linear(means, layer.weight[:rows].flatten(1).float(), bias)


def _depthwise(channels: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)


def _at_least_one(size: int) -> int:
    """max(size, 1), in a form that a traced graph keeps for other sizes."""
    return size.clamp(min=1) if isinstance(size, Tensor) else max(size, 1)


def _check_heads(heads: int, *widths: int) -> None:
    for width in widths:
        if width % heads:
            raise ValueError(f"{heads} heads do not divide {width} channels")
