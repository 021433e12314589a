"""Window attention: softmax attention inside square windows with learned relative positions, and Swin's shifted block.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, arXiv 2103.14030.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLayerNorm, ChannelLinear, DropPath, Mlp, pad_to_multiple
from models.layers.attention.ops.shared import divisor_up_to
from models.layers.attention.ops.windows import Tiling, project, window_attention
from models.layers.explained import Query, View, head_maps, query_weights, split_heads
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, arXiv 2103.14030"
HEAD_CHANNELS = 32  # the paper's


@register("SwinWindowAttention", "WindowAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class SwinWindowAttention(nn.Module):
    """softmax(q kᵀ / √d + B) v inside each window of a map (equation 4 of the paper).

    The map is padded to whole windows; padding is masked out, so that a map below one window is attended as it is. As published, windows
    are not shifted on a map with a side that is not above the window.

    Args:
        dim: channels in and out.
        window_size: height and width of a window (px).
        num_heads: number of heads; None for about 32 channels a head.
        qkv_bias: a bias in the projection of query, key and value.
        qk_scale: factor of the logits; None for 1 / sqrt(channels a head).
        attn_drop: dropout of the attention weights.
        proj_drop: dropout after the projection.
        shift_size: moves the windows down and right (px), cyclically; pixels wrapped around the border are masked from the others.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or the shift is negative or not below the window.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int] = 7,
        num_heads: int | None = None,
        qkv_bias: bool = True,
        *,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        shift_size: int = 0,
    ) -> None:
        super().__init__()
        if num_heads is None:
            num_heads = divisor_up_to(dim, max(1, dim // HEAD_CHANNELS))
        if dim % num_heads:
            raise ValueError(f"window attention: {num_heads} heads should divide {dim} channels")
        height, width = (window_size, window_size) if isinstance(window_size, int) else window_size
        self.window = (height, width)
        if not 0 <= shift_size < min(self.window):
            raise ValueError(f"window attention: shift_size {shift_size} should be at least 0 and below the window {self.window}")
        self.heads, self.shift, self.attn_drop = num_heads, shift_size, attn_drop
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", _relative_index(height, width))
        self.qkv = ChannelLinear(dim, 3 * dim, bias=qkv_bias)
        self.proj = ChannelLinear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        shift = self.shift * (height > self.window[0]) * (width > self.window[1]) if self.shift else 0
        qkv = pad_to_multiple(project(x, self.qkv), *self.window)
        query, key, value = self._roll(qkv, -shift).chunk(3, 1)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (heads, N, N)
        tiling = Tiling(*self.window, self.heads)
        regions, drop = self._regions(x, qkv, shift), self.attn_drop if self.training else 0.0
        out = window_attention(query, key, value, tiling, scale=self.scale, bias=bias, regions=regions, dropout=drop)
        return self.proj_drop(self.proj(self._roll(out, shift)[:, :, :height, :width]))

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """What one pixel attends to; outside its window nothing."""
        height, width = x.shape[-2:]
        what = f"attention of the query in its window of {self.window[0]}×{self.window[1]}"
        return head_maps(self.weights_of(x, query), (height, width), what=what)

    def weights_of(self, x: Tensor, query: Query) -> Tensor:
        """What one pixel gives each pixel's value: (1, C, H, W) -> (heads, H W), zero outside its window."""
        (height, width), (row, column) = x.shape[-2:], query.cell(x.shape[-2], x.shape[-1])
        shift = self.shift * (height > self.window[0]) * (width > self.window[1])
        padded = pad_to_multiple(project(x, self.qkv), *self.window)
        queries, keys, _ = (split_heads(part, self.heads) for part in padded.chunk(3, 1))
        rows, columns = (torch.arange(side, device=x.device) for side in padded.shape[-2:])
        moved = [(place - shift) % len(place) for place in (rows, columns)]  # where a pixel lies when windows are cut
        of_y, of_x = (place // side for place, side in zip(moved, self.window))
        same_y, same_x = of_y == of_y[row], of_x == of_x[column]
        near = [(p < shift) == (p[at] < shift) for p, at in ((rows, row), (columns, column))]  # not wrapped around the border
        inside = (same_y & near[0] & (rows < height))[:, None] & (same_x & near[1] & (columns < width))
        place = [at % side for at, side in zip((moved[0][row], moved[1][column]), self.window)]
        own = int(place[0] * self.window[1] + place[1])
        theirs = (moved[0] % self.window[0])[:, None] * self.window[1] + moved[1] % self.window[1]
        bias = self.relative_position_bias_table[self.relative_position_index[own, theirs.flatten()]].t()  # (heads, N)
        bias = bias.masked_fill(~inside.flatten(), -torch.inf)
        weights = query_weights(queries[:, row * padded.shape[-1] + column], keys, scale=self.scale, bias=bias)
        return weights.unflatten(1, padded.shape[-2:])[:, :height, :width].flatten(1)

    def _regions(self, x: Tensor, padded: Tensor, shift: int | Tensor) -> Tensor:
        """Numbers of the regions masked from each other, padding and, after a shift, wrapped pixels: (1, 1, H', W')."""
        regions = []
        for dim in (2, 3):
            place = torch.arange(padded.shape[dim], device=x.device)
            origin = (place + shift) % padded.shape[dim]  # where the pixel was before the shift
            wrapped = (origin < place).long()
            regions.append(wrapped + 2 * (origin >= x.shape[dim]).long())
        return (4 * regions[0][:, None] + regions[1])[None, None]

    def _roll(self, x: Tensor, shift: int | Tensor) -> Tensor:
        """Moves a map down and right, cyclically; by index, where a traced graph decides the shift."""
        if not isinstance(shift, Tensor):
            return x.roll((shift, shift), (2, 3)) if shift else x
        for dim in (2, 3):
            place = (torch.arange(x.shape[dim], device=x.device) - shift) % x.shape[dim]
            x = x.index_select(dim, place)
        return x


@register("SwinBlock", "SwinTransformerBlock", channels=rules.same_width, kind="attention", paper=PAPER)
class SwinBlock(nn.Module):
    """x + window attention(LN(x)), then x + MLP(LN(x)), on maps; the windows may be shifted (equation 3 of the paper).

    Args:
        dim: channels in and out.
        num_heads: see SwinWindowAttention.
        window_size: side of a window (px).
        shift_size: see SwinWindowAttention; half a window in every second block.
        mlp_ratio: hidden width of the MLP, in multiples of ``dim``.
        qkv_bias: see SwinWindowAttention.
        qk_scale: see SwinWindowAttention.
        drop: dropout after the projection and in the MLP.
        attn_drop: see SwinWindowAttention.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        window_size: int = 7,
        shift_size: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        *,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm(dim)
        drops = {"attn_drop": attn_drop, "proj_drop": drop}
        self.attn = SwinWindowAttention(dim, window_size, num_heads, qkv_bias, qk_scale=qk_scale, shift_size=shift_size, **drops)
        self.norm2 = ChannelLayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _relative_index(height: int, width: int) -> Tensor:
    """Row of the table for each pair of pixels of a window, query minus key: (N, N)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack((rows.flatten(), columns.flatten()))
    difference = place[:, :, None] - place[:, None, :]
    return (difference[0] + height - 1) * (2 * width - 1) + difference[1] + width - 1
