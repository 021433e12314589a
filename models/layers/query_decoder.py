"""A transformer decoder over object queries: self-attention, attention to sampled points of several maps, feed-forward layer.

Deformable DETR, arXiv 2010.04159, sections 4.1 and A.4; RT-DETR, arXiv 2304.08069. Parameter names are those of the published networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.shared import sample_bilinear

EPS = 1e-5  # of coordinates in 0-1 whose logit is taken


class DecoderSizes(NamedTuple):
    """Sizes of a decoder layer."""

    width: int = 256
    heads: int = 8
    levels: int = 3
    points: int = 4  # sampled in each level by each head
    hidden: int = 1024  # of the feed-forward layer
    dropout: float = 0.0


class DecoderLayer(nn.Module):
    """LN(q + self-attention), LN(q + attention to sampled points), LN(q + FFN(q)); (B, Q, C) to the same."""

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        width = sizes.width
        self.self_attn = QueryAttention(width, sizes.heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn = SampledAttention(sizes)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, sizes.hidden)
        self.linear2 = nn.Linear(sizes.hidden, width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, queries: Tensor, positions: Tensor, boxes: Tensor, maps: Sequence[Tensor], sees: Tensor | None = None) -> Tensor:
        """
        Args:
            queries: (B, Q, C).
            positions: (B, Q, C), added to the queries where they look.
            boxes: (B, Q, 4) cxcywh in 0-1, around which points are sampled.
            maps: (B, C, H_i, W_i) of each level.
            sees: (Q, Q) bool, whether a query (row) sees another one (column); None: all do.
        """
        queries = self.norm1(queries + self.dropout(self.self_attn(queries + positions, queries, sees)))
        queries = self.norm2(queries + self.dropout(self.cross_attn(queries + positions, boxes, maps)))
        return self.norm3(queries + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(queries))))))


class QueryAttention(nn.Module):
    """Multi-head attention between queries, with the parameters of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, placed: Tensor, x: Tensor, sees: Tensor | None = None) -> Tensor:
        """Queries and keys from ``placed``, values from ``x``: (B, Q, C) twice -> (B, Q, C)."""
        width = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        query, key = F.linear(placed, weight[: 2 * width], bias[: 2 * width]).chunk(2, dim=-1)
        value = F.linear(x, weight[2 * width :], bias[2 * width :])
        q, k, v = (t.unflatten(-1, (self.heads, width // self.heads)).transpose(1, 2) for t in (query, key, value))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2).flatten(2))


class SampledAttention(nn.Module):
    """Each query looks at a few points of each map; where, relative to its box, and how much, are linear in the query.

    Deformable DETR, equation 3; points are boxes' centres + offset / points · box sides / 2 (section A.4).
    """

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, each = sizes.width, sizes.heads * sizes.levels * sizes.points
        self.sampling_offsets = nn.Linear(width, 2 * each)
        self.attention_weights = nn.Linear(width, each)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self._initialise()

    def forward(self, queries: Tensor, boxes: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """(B, Q, C), boxes (B, Q, 4) cxcywh in 0-1 and maps (B, C, H_i, W_i) -> (B, Q, C)."""
        heads, levels, points = self.sizes.heads, self.sizes.levels, self.sizes.points
        offsets = self.sampling_offsets(queries).unflatten(-1, (heads, levels, points, 2))
        weights = self.attention_weights(queries).unflatten(-1, (heads, levels * points)).softmax(dim=-1)  # (B, Q, heads, L · P)
        centre, sides = boxes[:, :, None, None, None].split(2, dim=-1)
        places = 2 * (centre + offsets * (sides * (0.5 / points))) - 1  # (B, Q, heads, L, P, 2), -1 … 1 from edge to edge
        grids = places.permute(0, 2, 3, 1, 4, 5).flatten(0, 1).unbind(dim=1)  # a level: (B · heads, Q, P, 2)
        sampled = [self._sample(features, grid) for features, grid in zip(maps, grids)]  # (B · heads, d, Q, P) each
        weights = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # (B · heads, 1, Q, L · P)
        gathered = (torch.cat(sampled, dim=-1) * weights).sum(dim=-1)  # (B · heads, d, Q)
        return self.output_proj(gathered.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2))

    def _sample(self, features: Tensor, grid: Tensor) -> Tensor:
        """Values of one level at the places of a grid."""
        value = F.conv2d(features, self.value_proj.weight[:, :, None, None], self.value_proj.bias)
        value = value.unflatten(1, (self.sizes.heads, -1)).flatten(0, 1)  # (B · heads, d, H, W)
        return sample_bilinear(value, grid, align_corners=False).to(value.dtype)

    @torch.no_grad()
    def _initialise(self) -> None:
        """As published: every head looks in a direction of its own, its points at growing distances, with equal weights."""
        heads, levels, points = self.sizes.heads, self.sizes.levels, self.sizes.points
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        places = direction[:, None, None] * torch.arange(1, points + 1)[:, None]  # (heads, 1, P, 2)
        self.sampling_offsets.weight.zero_()
        self.sampling_offsets.bias.copy_(places.expand(heads, levels, points, 2).flatten())
        for layer in (self.attention_weights.weight, self.attention_weights.bias, self.value_proj.bias, self.output_proj.bias):
            layer.zero_()
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, c_in: int, hidden: int, c_out: int, layers: int) -> None:
        super().__init__()
        widths = [c_in, *[hidden] * (layers - 1), c_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        *before, last = self.layers
        for layer in before:
            x = F.relu(layer(x))
        return last(x)


class QueryDecoder(nn.Module):
    """The layers, each of which refines the boxes of the one before it."""

    def __init__(self, sizes: DecoderSizes, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(sizes) for _ in range(layers))


def full(x: Tensor) -> Tensor:
    """In float32 where the precision is lower: half a cell of a map, or a px of an image, is lost in 16 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def logit(x: Tensor) -> Tensor:
    """The inverse of the sigmoid for x in 0-1, finite at its ends."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=EPS) / (1 - x).clamp(min=EPS))
