"""Window attention: softmax attention inside square windows with learned relative positions, and Swin's shifted block.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, arXiv 2103.14030.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import channel_rules as rules
from models.layers.attention.common import ChannelLayerNorm, ChannelLinear, DropPath, Mlp, from_windows, pad_to_multiple, to_windows
from models.layers.attention.shared import divisor_up_to
from models.registry import register

PAPER = "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, arXiv 2103.14030"
HEAD_CHANNELS = 32  # the paper's
MASKED = -100.0  # added to the logits between pixels that are no neighbours, as published


@register("SwinWindowAttention", "WindowAttention", channels=rules.attends, paper=PAPER)
class SwinWindowAttention(nn.Module):
    """softmax(q kᵀ / √d + B) v inside each window of a map (equation 4 of the paper).

    The map is padded to whole windows; padding is masked out, so that a map below one window is attended as it is. As published, windows
    are not shifted on a map with a side that is not above the window.

    Args:
        dim: channels in and out.
        window_size: height and width of a window (px).
        num_heads: number of heads; None for about 32 channels a head.
        qkv_bias: a bias in the projection of query, key and value.
        proj_drop: dropout after the projection.
        shift_size: moves the windows down and right (px), cyclically; pixels that come round the border are no neighbours.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or the shift is negative or not below the window.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int] = 7,
        num_heads: int | None = None,
        qkv_bias: bool = True,
        *,
        proj_drop: float = 0.0,
        shift_size: int = 0,
    ) -> None:
        super().__init__()
        if num_heads is None:
            num_heads = divisor_up_to(dim, max(1, dim // HEAD_CHANNELS))
        if dim % num_heads:
            raise ValueError(f"window attention: {num_heads} heads should divide {dim} channels")
        self.window = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
        if not 0 <= shift_size < min(self.window):
            raise ValueError(f"window attention: shift_size {shift_size} should be at least 0 and below the window {self.window}")
        self.heads, self.shift = num_heads, shift_size
        height, width = self.window
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
        qkv = pad_to_multiple(self.qkv(x), *self.window)
        mask = self._mask(x, qkv, shift)
        out = self._roll(self._attend(self._roll(qkv, -shift), mask), shift)
        return self.proj_drop(self.proj(out[:, :, :height, :width]))

    def _attend(self, qkv: Tensor, mask: Tensor) -> Tensor:
        """(B, 3 C, H', W') -> (B, C, H', W') in whole windows; ``mask`` (windows, 1, N, N)."""
        query, key, value = (self._windows(part) for part in qkv.chunk(3, 1))
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (heads, N, N)
        mask = (mask + bias).to(query.dtype).flatten(0, 1)  # (windows heads, N, N), the same for all images
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.unsqueeze(0))
        out = out.unflatten(1, (-1, self.heads)).transpose(2, 3)  # (B, windows, N, heads, d)
        out = out.reshape(qkv.shape[0], -1, self.window[0] * self.window[1], qkv.shape[1] // 3)
        return from_windows(out, *self.window, columns=qkv.shape[3] // self.window[1])

    def _windows(self, x: Tensor) -> Tensor:
        """(B, heads d, H', W') -> (B, windows heads, N, d)."""
        return to_windows(x, *self.window).unflatten(3, (self.heads, -1)).transpose(2, 3).flatten(1, 2)

    def _mask(self, x: Tensor, padded: Tensor, shift: int | Tensor) -> Tensor:
        """0 between pixels of one region, MASKED otherwise: (windows, 1, N, N).

        Regions are the padding and, after a shift, what came round the border.
        """
        regions = []
        for dim in (2, 3):
            place = torch.arange(padded.shape[dim], device=x.device)
            origin = (place + shift) % padded.shape[dim]  # where the pixel was before the shift
            wrapped = (origin < place).long()
            regions.append(wrapped + 2 * (origin >= x.shape[dim]).long())
        region = (4 * regions[0][:, None] + regions[1]).to(torch.float32)[None, None]
        region = to_windows(region, *self.window)[0]  # (windows, N, 1)
        return (region != region.transpose(1, 2)).unsqueeze(1) * MASKED

    def _roll(self, x: Tensor, shift: int | Tensor) -> Tensor:
        """Moves a map down and right, cyclically, by index, so that a traced graph may decide the shift; no shift costs nothing."""
        if not isinstance(shift, Tensor) and shift == 0:
            return x
        for dim in (2, 3):
            place = (torch.arange(x.shape[dim], device=x.device) - shift) % x.shape[dim]
            x = x.index_select(dim, place)
        return x


@register("SwinBlock", "SwinTransformerBlock", channels=rules.attends, paper=PAPER)
class SwinBlock(nn.Module):
    """x + window attention(LN(x)), then x + MLP(LN(x)), on maps; the windows may be shifted (equation 3 of the paper).

    Args:
        dim: channels in and out.
        num_heads: see SwinWindowAttention.
        window_size: side of a window (px).
        shift_size: see SwinWindowAttention; half a window in every second block.
        mlp_ratio: hidden width of the MLP, in multiples of ``dim``.
        qkv_bias: see SwinWindowAttention.
        drop: dropout after the projection and in the MLP.
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
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm(dim)
        self.attn = SwinWindowAttention(dim, window_size, num_heads, qkv_bias, proj_drop=drop, shift_size=shift_size)
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
