"""Axial attention: along the columns and along the rows, each on its own."""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLinear
from models.layers.attention.ops.shared import divisor_up_to
from models.layers.attention.ops.windows import Tiling, channels_last, project, window_attention
from models.layers.explained import Query, View, head_maps, query_weights, split_heads
from models.spec import channel_rules as rules
from models.spec.registry import register


@register(
    "AxialAttention",
    channels=rules.same_width,
    kind="attention",
    paper="Axial Attention in Multidimensional Transformers, arXiv 1912.12180",
)
class AxialAttention(nn.Module):
    """Softmax attention within each column plus the same within each row (section 3.1 of the paper); O(N (H + W)) instead of O(N²).

    Args:
        dim: channels in and out.
        heads: number of heads; the largest divisor of ``dim`` that is not above it.
        dim_heads: channels a head; None for ``dim // heads``.
        sum_axial_out: add both; False applies columns, then rows.
        num_dimensions: 2, the only number that a map has.
        dim_index: 1, the place of the channels.

    Raises:
        ValueError: another number of dimensions, or channels in another dimension.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_heads: int | None = None,
        sum_axial_out: bool = True,
        num_dimensions: int = 2,
        dim_index: int = 1,
    ) -> None:
        super().__init__()
        if num_dimensions != 2 or dim_index != 1:
            raise ValueError(f"AxialAttention works on (B, C, H, W): 2 dimensions and channels at 1, not {num_dimensions} and {dim_index}")
        heads = divisor_up_to(dim, heads)
        self.sum_axial_out = sum_axial_out
        self.axial_attentions = nn.ModuleList(_Axis(dim, heads, dim_heads or dim // heads, axis) for axis in (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        down, across = self.axial_attentions
        x = channels_last(x)
        return down(x) + across(x) if self.sum_axial_out else across(down(x))


class _Axis(nn.Module):
    """Attention along one axis of a map; the layers are under ``fn``, as published."""

    def __init__(self, channels: int, heads: int, width: int, axis: int) -> None:
        super().__init__()
        self.heads, self.axis = heads, axis
        self.fn = _Projections(channels, heads * width)

    def forward(self, x: Tensor) -> Tensor:
        query, (key, value) = project(x, self.fn.to_q), project(x, self.fn.to_kv).chunk(2, 1)
        line = (x.shape[2], 1) if self.axis == 2 else (1, x.shape[3])
        scale = (query.shape[1] // self.heads) ** -0.5
        return self.fn.to_out(window_attention(query, key, value, Tiling(*line, self.heads), scale=scale))

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """What one pixel attends to in its column, or in its row."""
        (height, width), (row, column) = x.shape[-2:], query.cell(x.shape[-2], x.shape[-1])
        maps = project(x, self.fn.to_q), project(x, self.fn.to_kv).chunk(2, 1)[0]
        queries, keys = (split_heads(part, self.heads).unflatten(1, (height, width)) for part in maps)
        line = keys[:, :, column] if self.axis == 2 else keys[:, row]
        weights = query_weights(queries[:, row, column], line, scale=queries.shape[3] ** -0.5)
        plane = weights.new_zeros(self.heads, height, width)
        plane[(slice(None), slice(None), column) if self.axis == 2 else (slice(None), row)] = weights
        return head_maps(plane.flatten(1), (height, width), what=f"attention of the query in its {'column' if self.axis == 2 else 'row'}")


class _Projections(nn.Module):
    """The pointwise layers of one axis, a container for their published names."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.to_q = ChannelLinear(channels, inner, bias=False)
        self.to_kv = ChannelLinear(channels, 2 * inner, bias=False)
        self.to_out = ChannelLinear(inner, channels)
