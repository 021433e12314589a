"""Deformable attention: all pixels attend to a coarse grid of samples at learned offsets.

Vision Transformer with Deformable Attention (DAT), arXiv 2201.00520.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import NamedLayerNorm, pad_to_multiple, resize_matrix
from models.layers.attention.ops.routing import at_least_one
from models.layers.attention.ops.shared import depthwise, divisor_up_to, sample_bilinear, unit_line, window_means
from models.layers.explained import Points, Query, View, query_weights
from models.spec import channel_rules as rules
from models.spec.registry import register

HEAD_CHANNELS = 32  # the paper's


@register(
    "DATAttention",
    "DAttention",
    channels=rules.same_width,
    kind="attention",
    paper="Vision Transformer with Deformable Attention, arXiv 2201.00520",
)
class DATAttention(nn.Module):
    """softmax(q kᵀ / √d + position bias) v, with k and v at sampled points (equations 4 to 9 of the paper).

    Every ``stride``-th pixel is a sampling point; a small network on the queries moves it, per group of channels. The position bias is
    read from a learned table at the distance between query and sample, in units of the map, so one table serves every size. Sampling
    and positions are in float32, so that it works in half precision.

    Limits: time and memory grow with H W times the number of samples; keep ``stride`` at 2 or more on large maps.

    Args:
        dim: channels in and out; None for ``n_heads * n_head_channels``.
        n_heads: number of heads; None for ``dim // n_head_channels``, or about 32 channels a head.
        n_groups: groups with their own offsets; must divide the heads.
        stride: distance of the sampling points (px).
        ksize: kernel of the offset network (px).
        offset_range_factor: largest offset, in distances of the sampling points; negative: limited by the map only.
        q_size: map at which the table has one entry a pixel distance.
        kv_size: the published constructor does not read it: None, ``q_size``, or ``q_size // stride``, the samples of ``fixed_pe``.
        n_head_channels: channels a head; None for ``dim // n_heads``, or 32 without ``dim``.
        use_pe: position bias.
        dwc_pe: a depth-wise 3x3 of the queries instead of the table.
        log_cpb: a small network on log distances instead of the table.
        no_off: the means of ``stride`` x ``stride`` pixels in place of samples (at a border, of the pixels there), no position bias.
        fixed_pe: a table with an entry for every pair of pixel and sample, wherever the sample has moved to; it is made for ``q_size`` and
            resized linearly for other maps.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout after the projection.

    Raises:
        ValueError: heads, groups and channels do not divide, or a ``kv_size`` that does not follow from ``q_size``.
    """

    rpe_table: Any  # by ``pe``: a convolution, an MLP or a table of parameters

    def __init__(
        self,
        dim: int | None = None,
        n_heads: int | None = None,
        n_groups: int = 1,
        stride: int = 2,
        ksize: int = 3,
        offset_range_factor: float = 2.0,
        *,
        q_size: int | Sequence[int] = 20,
        kv_size: int | Sequence[int] | None = None,
        n_head_channels: int | None = None,
        use_pe: bool = True,
        dwc_pe: bool = False,
        log_cpb: bool = False,
        no_off: bool = False,
        fixed_pe: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim is None:
            dim = (n_heads or 1) * (n_head_channels or HEAD_CHANNELS)
        if n_heads is None and n_head_channels:
            n_heads = dim // n_head_channels
        elif n_heads is None:
            n_heads = n_groups * divisor_up_to(max(1, dim // n_groups), max(1, dim // (HEAD_CHANNELS * n_groups)))
        if n_head_channels and n_heads * n_head_channels != dim:
            raise ValueError(f"DATAttention: {n_heads} heads of {n_head_channels} channels should make {dim} channels")
        if dim % n_heads or n_heads % n_groups:
            raise ValueError(f"DATAttention: {n_heads} heads should divide {dim} channels, and {n_groups} groups the heads")
        self.heads, self.groups, self.stride, self.ksize = n_heads, n_groups, stride, ksize
        self.offset_range, self.no_off, self.attn_drop = offset_range_factor, no_off, attn_drop
        self.scale = (dim // n_heads) ** -0.5
        if not no_off:
            self.conv_offset = _offset_network(dim // n_groups, ksize, stride)
        self.proj_q = nn.Conv2d(dim, dim, 1)
        self.proj_k = nn.Conv2d(dim, dim, 1)
        self.proj_v = nn.Conv2d(dim, dim, 1)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.proj_drop = nn.Dropout(proj_drop)
        kinds = {"dwc": dwc_pe, "fixed": fixed_pe, "log": log_cpb, "table": True}
        self.pe = "none" if not use_pe or (no_off and not dwc_pe) else next(kind for kind, wanted in kinds.items() if wanted)
        self._add_positions(dim, n_heads, _pair(q_size))
        samples = self.fixed_size[2:]
        if kv_size is not None and _pair(kv_size) not in (self.fixed_size[:2], samples):
            raise ValueError(f"DATAttention: kv_size {kv_size} should be q_size {q_size} or its samples {list(samples)} at stride {stride}")

    def _add_positions(self, dim: int, heads: int, size: Sequence[int]) -> None:
        height, width = size
        self.fixed_size = (height, width, at_least_one(height // self.stride), at_least_one(width // self.stride))
        if self.pe == "dwc":
            self.rpe_table = depthwise(dim, 3)
        elif self.pe == "log":
            self.rpe_table = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, heads // self.groups, bias=False))
        elif self.pe in ("table", "fixed"):
            rows, columns, sample_rows, sample_columns = self.fixed_size
            fixed = (rows * columns, sample_rows * sample_columns)
            self.rpe_table = nn.Parameter(torch.empty(heads, *(fixed if self.pe == "fixed" else (2 * height - 1, 2 * width - 1))))
            nn.init.trunc_normal_(self.rpe_table, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        query = self.proj_q(x)
        if self.no_off:
            sampled, position = window_means(x, self.stride), None
        else:
            position, _ = self.sampling_points(query)
            sampled = self._sample(x, position)
        bias = None if position is None else self._bias(query, position)
        q, k, v = (self._heads_first(part) for part in (query, self.proj_k(sampled), self.proj_v(sampled)))
        drop = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=self.scale)  # (B, heads, N, d)
        out = out.transpose(2, 3).reshape(query.shape)
        if self.pe == "dwc":
            out = out + self.rpe_table(query)
        return self.proj_drop(self.proj_out(out))

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """The sampling points of each group with the places that they were moved from, and what one pixel takes from each."""
        if self.no_off:
            return ()
        queries = self.proj_q(x)
        position, reference = self.sampling_points(queries)
        place, keys = query.cell_number(x.shape[2], x.shape[3]), self._heads_first(self.proj_k(self._sample(x, position)))[0]
        bias = self._bias(queries, position)
        of_query = None if bias is None else bias[0, :, place]
        weights = query_weights(self._heads_first(queries)[0, :, place], keys, scale=self.scale, bias=of_query)
        by_group = weights.unflatten(0, (self.groups, -1)).mean(1)  # (groups, samples)
        cells = x.new_tensor((x.shape[3], x.shape[2]), dtype=torch.float32)
        # sampling counts from the middle of the first cell (-1) to the middle of the last (1), not from edge to edge
        middles = ((part[0].flatten(1, 2).flip(-1) + 1) / 2 * (cells - 1) for part in (position, reference))
        points = ((middle + 0.5) / cells for middle in middles)
        names = (f"sampling points{f', group {group}' if self.groups > 1 else ''}" for group in range(self.groups))
        return tuple(Points(name, xy, weight, origin) for name, weight, xy, origin in zip(names, by_group, *points))

    def sampling_points(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Where to sample: moved points and the grid they start from, each (B, groups, H', W', 2), rows first, in [-1, 1]; float32."""
        batch, channels, *size = query.shape
        grouped = query.reshape(batch * self.groups, channels // self.groups, *size)
        if self.ksize == self.stride:  # patches: the network has no padding of its own
            grouped = pad_to_multiple(grouped, self.stride, self.stride)
        offset = self.conv_offset(grouped).float().permute(0, 2, 3, 1)  # (B G, H', W', 2)
        height, width = offset.shape[1:3]
        rows, columns = (torch.arange(n, device=query.device, dtype=torch.float32) for n in (height, width))
        reach = torch.stack([line[-1].clamp(min=1.0) for line in (rows, columns)])  # H' - 1 and W' - 1
        reference = (_grid(rows, columns) + 0.5) / reach * 2 - 1 + torch.zeros_like(offset)
        if self.offset_range >= 0:
            position = reference + offset.tanh() / reach * self.offset_range
        else:
            position = (reference + offset).clamp(-1.0, 1.0)
        shape = (batch, self.groups, height, width, 2)  # sizes by name, so that an ONNX graph follows them
        return position.reshape(shape), reference.reshape(shape)

    def _sample(self, x: Tensor, position: Tensor) -> Tensor:
        """(B, C, H, W) at (B, groups, H', W', 2) -> (B, C, H', W')."""
        grouped = x.unflatten(1, (self.groups, -1)).flatten(0, 1)
        sampled = sample_bilinear(grouped, position.flatten(0, 1).flip(-1))
        return sampled.unflatten(0, (-1, self.groups)).flatten(1, 2).to(x.dtype)

    def _bias(self, query: Tensor, position: Tensor) -> Tensor | None:
        """Position bias of the logits: (B, heads, H W, samples)."""
        if self.pe == "fixed":
            return self._fixed_bias(query, position)
        if self.pe not in ("table", "log"):
            return None
        height, width = query.shape[-2:]
        rows, columns = unit_line(height, query), unit_line(width, query)
        grid = _grid(rows, columns).flatten(0, 1)  # (H W, 2)
        points = position.flatten(2, 3)  # (B, G, samples, 2)
        distance = (grid[:, None] - points[:, :, None]) / 2  # (B, G, H W, samples, 2)
        if self.pe == "log":
            logs = distance.sign() * torch.log2(8 * distance.abs() + 1) / 3
            bias = self.rpe_table(logs.to(query.dtype)).permute(0, 1, 4, 2, 3)  # (B, G, heads / G, H W, samples)
        else:  # all images of a group read one table
            lines = distance.flip(-1).transpose(0, 1).flatten(1, 2)  # (G, B H W, samples, 2)
            read = sample_bilinear(self.rpe_table.unflatten(0, (self.groups, -1)), lines)
            bias = read.unflatten(2, (query.shape[0], -1)).permute(2, 0, 1, 3, 4)
        return bias.flatten(1, 2).to(query.dtype)

    def _fixed_bias(self, query: Tensor, position: Tensor) -> Tensor:
        """The dense table for the map and samples at hand: (1, heads, H W, samples)."""
        table = self.rpe_table.unflatten(2, self.fixed_size[2:]).unflatten(1, self.fixed_size[:2])  # (heads, h, w, h', w')
        for axis, target in enumerate((*query.shape[-2:], *position.shape[2:4]), start=1):
            moved = table.movedim(axis, 4)  # 4, not -1, which an ONNX graph cannot name
            table = (moved @ resize_matrix(moved.shape[4], target, table).transpose(0, 1)).movedim(4, axis)
        return table.flatten(3).flatten(1, 2).unsqueeze(0).to(query.dtype)

    def _heads_first(self, x: Tensor) -> Tensor:
        """(B, heads d, H, W) -> (B, heads, H W, d)."""
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3).contiguous()


def _pair(size: int | Sequence[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _grid(rows: Tensor, columns: Tensor) -> Tensor:
    """Every pair of a row's and a column's coordinate: (H, W, 2)."""
    return torch.stack((rows[:, None] + torch.zeros_like(columns), columns + torch.zeros_like(rows)[:, None]), 2)


def _offset_network(channels: int, kernel: int, stride: int) -> nn.Sequential:
    padding = 0 if kernel == stride else kernel // 2
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels),
        NamedLayerNorm(channels),
        nn.GELU(),
        nn.Conv2d(channels, 2, 1, bias=False),
    )
