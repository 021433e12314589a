"""Bi-level routing attention, first published form: each window of a map chooses a few windows, and its pixels attend to those alone.

BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLinear, from_windows, full_precision, pad_to_multiple, recorded, to_windows
from models.layers.attention.ops.routing import adaptive_max, adaptive_mean, at_least_one, check_heads, project_in_float32, routed_attention
from models.layers.attention.ops.routing_views import RegionGrid, chosen_weights
from models.layers.attention.ops.shared import depthwise
from models.layers.explained import Query, View
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810"
KV_MODES = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool")


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
        kv_per_win: keys a side and window, for ``ada_avgpool`` and ``ada_maxpool``; published networks write -1 for the others.
        kv_downsample_ratio: stride, for ``avgpool`` and ``maxpool``.
        kv_downsample_kernel: their kernel; None for the stride.
        kv_downsample_mode: how the keys and values of a window are downsampled: identity, ada_avgpool, ada_maxpool, avgpool,
            maxpool.
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

    below_one = ("side_dwconv", "kv_per_win")  # options of which numbers below 1 mean something

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
        check_heads(num_heads, dim, qk_dim)
        if kv_downsample_mode not in KV_MODES:
            raise ValueError(f"kv_downsample_mode {kv_downsample_mode!r} is not one of {', '.join(KV_MODES)}")
        if kv_downsample_mode.startswith("ada_") and kv_per_win < 1:
            raise ValueError(f"kv_per_win {kv_per_win} should be at least 1 with kv_downsample_mode {kv_downsample_mode!r}")
        if param_attention not in ("qkvo", "qkv"):
            raise ValueError(f"param_attention {param_attention!r} is neither 'qkvo' nor 'qkv'")
        if (diff_routing or param_routing) and not soft_routing:
            raise ValueError("diff_routing and param_routing need soft_routing: a hard choice has no gradient")
        self.dim, self.qk_dim, self.num_heads, self.n_win = dim, qk_dim, num_heads, n_win
        self.scale = qk_scale or qk_dim**-0.5
        self.topk = min(topk, n_win**2)
        self.soft_routing, self.diff_routing = soft_routing, diff_routing
        self.lepe = depthwise(dim, side_dwconv) if side_dwconv > 0 else None
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
        keys, values = (self._downsample(part, *window) for part in (key, value))
        out = routed_attention(query, keys, values, index, heads=self.num_heads, scale=self.scale, weights=soft)
        result = from_windows(out, *window, columns=self.n_win)
        if self.lepe is not None:
            result = result + self.lepe(from_windows(value, *window, columns=self.n_win))
        return self.wo(result)[..., :height, :width]

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """The region of the query, those that it chose, what it attends to in them, and how often each region is chosen."""
        padded = pad_to_multiple(x, self.n_win, self.n_win)
        window = (padded.shape[-2] // self.n_win, padded.shape[-1] // self.n_win)
        pixels = to_windows(padded, *window)
        queries, key, _ = self.qkv(pixels)
        index, soft = self._route(pixels)
        keys = self._downsample(key, *window)[0]
        cell, grid = query.cell(x.shape[2], x.shape[3]), RegionGrid((self.n_win, self.n_win), window, (x.shape[2], x.shape[3]))
        region, pixel = grid.place_of(*cell)
        factors = soft[0, region] if self.soft_routing else None
        weights = chosen_weights(queries[0, region, pixel], keys[index[0, region]], heads=self.num_heads, scale=self.scale, factors=factors)
        return grid.views(region, index[0], weights.mean(0))

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

    def _downsample(self, windows: Tensor, height: int, width: int) -> Tensor:
        """(B, n², h w, C) -> (B, n², fewer, C)."""
        if self.kv_mode == "identity":
            return windows
        batch, count, _, channels = windows.shape
        if self.kv_mode.startswith("ada_"):
            bins, pooled = self.kv_per_win, adaptive_mean if self.kv_mode == "ada_avgpool" else adaptive_max
            rows = pooled(windows.reshape(batch, count, height, width * channels), height, bins)
            return pooled(rows.reshape(batch, count, bins, width, channels), width, bins).reshape(batch, count, -1, channels)
        maps = windows.reshape(batch * count, height, width, channels).permute(0, 3, 1, 2)
        return self._pool(maps).flatten(2).transpose(1, 2).reshape(batch, count, -1, channels)

    def _pool(self, maps: Tensor) -> Tensor:
        """Pooling that rounds up; a window below the kernel has one value, the mean or maximum of its pixels."""
        short = [at_least_one(self.kv_kernel - side + 1) - 1 for side in maps.shape[-2:]]
        margin = (0, short[1], 0, short[0])
        pool = partial(F.avg_pool2d if self.kv_mode == "avgpool" else F.max_pool2d, kernel_size=self.kv_kernel, stride=self.kv_stride)
        if not recorded() and not any(short):
            return pool(maps, ceil_mode=True)
        if self.kv_mode == "maxpool":
            return pool(F.pad(maps, margin, value=-torch.inf), ceil_mode=True)
        total, share = (pool(F.pad(part, margin), ceil_mode=True) for part in (maps, torch.ones_like(maps[:1, :1])))
        return total / share


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
        return list(project_in_float32(means, self.qkv, 2 * self.qk_dim).chunk(2, dim=-1))


class _Router(nn.Module):
    """The published container of the routing projection, key ``router.emb``."""

    def __init__(self, qk_dim: int) -> None:
        super().__init__()
        self.emb = nn.Linear(qk_dim, qk_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.emb.weight.float(), self.emb.bias.float())
