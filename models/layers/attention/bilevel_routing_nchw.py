"""Bi-level routing attention, second published form: channels first, windows of a size that the map gives.

BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.bilevel_routing import PAPER
from models.layers.attention.ops.common import from_windows, full_precision, pad_to_multiple, to_windows
from models.layers.attention.ops.routing import at_least_one, check_heads, project_in_float32, routed_attention
from models.layers.attention.ops.routing_views import RegionGrid, chosen_weights
from models.layers.attention.ops.shared import depthwise
from models.layers.explained import Query, View
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("nchwBRA", "BiLevelRoutingAttention_nchw", channels=rules.same_width, kind="attention", paper=PAPER)
class BiLevelRoutingAttentionNCHW(nn.Module):
    """Bi-level routing attention in its second published form, channels first.

    The same attention as BiLevelRoutingAttention with other parameter names (``qkv_linear``, ``output_linear``), and other numbers where
    ``n_win`` does not divide the map: windows have H // n_win by W // n_win pixels, their number follows from the map, query, key and
    value (not the input) are zero-padded, and padding counts as keys with logit 0. The scale is ``dim ** -0.5``.

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
        attn_backend: ``torch``, the only one of the published module that runs.

    Raises:
        ValueError: heads that do not divide ``dim``, or another backend.
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
        attn_backend: str = "torch",
    ) -> None:
        super().__init__()
        if attn_backend != "torch":
            raise ValueError(f"nchwBRA: attn_backend {attn_backend!r} should be 'torch'")
        check_heads(num_heads, dim, dim)
        self.dim, self.num_heads, self.n_win, self.topk = dim, num_heads, n_win, topk
        self.scale = qk_scale or dim**-0.5
        self.lepe = depthwise(dim, side_dwconv) if side_dwconv > 0 else None
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
        self.output_linear = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        window = (at_least_one(height // self.n_win), at_least_one(width // self.n_win))
        qkv = self.qkv_linear(x)
        padded = pad_to_multiple(qkv, *window)
        columns = padded.shape[-1] // window[1]
        query, key, value = to_windows(padded, *window).chunk(3, dim=-1)
        out = routed_attention(query, key, value, self._route(x, *window), heads=self.num_heads, scale=self.scale)
        result = from_windows(out, *window, columns=columns)[..., :height, :width]
        if self.lepe is not None:
            result = result + self.lepe(qkv[:, 2 * self.dim :])
        return self.output_linear(result)

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """The region of the query, those that it chose, what it attends to in them, and how often each region is chosen."""
        height, width = x.shape[-2:]
        window = (at_least_one(height // self.n_win), at_least_one(width // self.n_win))
        padded = pad_to_multiple(self.qkv_linear(x), *window)
        queries, keys, _ = to_windows(padded, *window).chunk(3, dim=-1)
        index = self._route(x, *window)[0]
        grid = RegionGrid((padded.shape[-2] // window[0], padded.shape[-1] // window[1]), window, (height, width))
        region, pixel = grid.place_of(*query.cell(height, width))
        weights = chosen_weights(queries[0, region, pixel], keys[0, index[region]], heads=self.num_heads, scale=self.scale)
        return grid.views(region, index, weights.mean(0))

    def _route(self, x: Tensor, height: int, width: int) -> Tensor:
        """The chosen windows (B, windows, topk), best first; a window at the border has the mean of its real pixels."""
        with full_precision(x), torch.no_grad():
            ones = torch.ones_like(x[:1, :1], dtype=torch.float32)
            count = to_windows(pad_to_multiple(ones, height, width), height, width).sum(2)
            means = to_windows(pad_to_multiple(x.float(), height, width), height, width).sum(2) / count  # (B, windows, C)
            query, key = project_in_float32(means, self.qkv_linear, 2 * self.dim).chunk(2, dim=-1)
            affinity = query @ key.transpose(1, 2)
            return torch.topk(affinity, min(self.topk, affinity.shape[-1]), dim=-1).indices
