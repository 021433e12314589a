"""Self-attention with positions in a residual bottleneck, in the form of YOLO variants and in the paper's.

Bottleneck Transformers for Visual Recognition (BoTNet), arXiv 2101.11605.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import attend, fused_attention, resize_matrix
from models.layers.attention.ops.shared import window_means
from models.layers.conv import Conv
from models.layers.explained import Query, View, head_maps, query_weights, split_heads
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Bottleneck Transformers for Visual Recognition (BoTNet), arXiv 2101.11605"


@register("MHSA", "BoTMHSA", channels=rules.same_width, kind="attention", paper=PAPER)
class MHSA(nn.Module):
    """Multi-head self-attention in the form that YOLO variants use: logits q_i·k_j + p_i·q_j, no scale.

    The position p of row y and column x is ``rel_h_weight`` + ``rel_w_weight``; the published names are kept although the table called
    h runs along the width. It multiplies the query of the *other* position, as published. The term is folded into query and key,
    [q_i, p_i]·[k_j, q_j], so that no N x N matrix is built, and the tables are resized to the map at hand (the published code cuts
    them off, or fails).

    Args:
        n_dims: channels in and out.
        width: rows of the position table.
        height: columns of the position table.
        heads: number of heads.
        pos_emb: whether there are positions.

    Raises:
        ValueError: heads that do not divide the channels.
    """

    def __init__(self, n_dims: int, width: int = 14, height: int = 14, heads: int = 4, pos_emb: bool = False) -> None:
        super().__init__()
        if n_dims % heads:
            raise ValueError(f"{heads} heads do not divide {n_dims} channels")
        self.heads = heads
        self.query = nn.Conv2d(n_dims, n_dims, 1)
        self.key = nn.Conv2d(n_dims, n_dims, 1)
        self.value = nn.Conv2d(n_dims, n_dims, 1)
        self.pos = pos_emb
        if pos_emb:
            self.rel_h_weight = nn.Parameter(torch.randn(1, heads, n_dims // heads, 1, height))
            self.rel_w_weight = nn.Parameter(torch.randn(1, heads, n_dims // heads, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        query, key = self._query_and_key(x)
        return attend(query, key, self.value(x), heads=self.heads, scale=1.0)

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """The affinities of one pixel to all others."""
        return head_maps(self.weights_of(x, query), (x.shape[2], x.shape[3]))

    def weights_of(self, x: Tensor, query: Query) -> Tensor:
        """What one pixel gives each pixel's value: (1, C, H, W) -> (heads, H W)."""
        queries, keys = (split_heads(part, self.heads) for part in self._query_and_key(x))
        return query_weights(queries[:, query.cell_number(x.shape[2], x.shape[3])], keys, scale=1.0)

    def _query_and_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both with the positions beside them, if there are any: (B, C, H, W) -> two times (B, C or 2 C, H, W)."""
        query, key = self.query(x), self.key(x)
        if self.pos:
            place = self._positions(query).expand(query.shape[0], -1, -1, -1, -1)
            query, key = self._beside(query, place), self._beside(key, query.unflatten(1, (self.heads, -1)))
        return query, key

    def _beside(self, x: Tensor, other: Tensor) -> Tensor:
        """Head by head: (B, heads * d, H, W) and (B, heads, d, H, W) -> (B, heads * 2 d, H, W)."""
        return torch.cat([x.unflatten(1, (self.heads, -1)), other.to(x.dtype)], dim=2).flatten(1, 2)

    def _positions(self, x: Tensor) -> Tensor:
        """The tables at the size of a map (B, C, H, W): (1, heads, d, H, W)."""
        rows, columns = self.rel_w_weight, self.rel_h_weight
        to_height = resize_matrix(rows.shape[3], x.shape[2], like=rows)
        to_width = resize_matrix(columns.shape[4], x.shape[3], like=columns)
        return to_height @ rows + columns @ to_width.transpose(0, 1)


@register("BottleneckTransformer", channels=rules.out_width, kind="attention", paper=PAPER)
class BottleneckTransformer(nn.Module):
    """A 1x1 convolution and multi-head self-attention, with a residual.

    Differences from the published code: positions are used (there the tables are never built); the projection of the residual, which it
    builds for another width or stride, is used; its unused layer ``fc1`` is left out.

    Args:
        c1: channels in.
        c2: channels out.
        stride: 2 halves the map by average pooling.
        heads: heads of the attention.
        mhsa: attention; else a 3x3 convolution.
        resolution: rows and columns of the position table; None for 14 x 14.
        expansion: accepted because published calls pass it; only 1 has a meaning there.
        pos_emb: positions.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        stride: int = 1,
        heads: int = 4,
        mhsa: bool = True,
        resolution: Sequence[int] | None = None,
        expansion: int = 1,
        pos_emb: bool = True,
    ) -> None:
        super().__init__()
        if expansion != 1:
            raise ValueError(f"expansion {expansion}: the block has no other than 1")
        width, height = (int(n) for n in resolution or (14, 14))
        self.cv1 = Conv(c1, c2, 1, 1)
        pool = [HalvingMean()] if stride == 2 else []
        self.cv2 = nn.Sequential(MHSA(c2, width, height, heads, pos_emb), *pool) if mhsa else Conv(c2, c2, 3, stride)
        same = stride == 1 and c1 == c2
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(c1, c2, 1, stride, bias=False), nn.BatchNorm2d(c2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, ceil(H / stride), ceil(W / stride))."""
        return self.shortcut(x) + self.cv2(self.cv1(x))


@register("BoT3", channels=rules.out_width_repeated, kind="attention", paper=PAPER)
class BoT3(nn.Module):
    """A cross-stage block (C3) whose inner blocks are BottleneckTransformer.

    Differences from the published code: positions are on by default (there ``w`` and ``h`` have no effect), and see BottleneckTransformer.

    Args:
        c1: channels in.
        c2: channels out; ``c2 * e`` must be a multiple of four (heads).
        n: inner blocks.
        e: inner width, as a fraction of ``c2``.
        e2: accepted because published calls pass it; see BottleneckTransformer's ``expansion``.
        w: rows of the position tables.
        h: columns of the position tables.
        pos_emb: positions.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, e: float = 0.5, e2: int = 1, w: int = 20, h: int = 20, pos_emb: bool = True) -> None:
        super().__init__()
        inner = int(c2 * e)
        self.cv1 = Conv(c1, inner, 1, 1)
        self.cv2 = Conv(c1, inner, 1, 1)
        self.cv3 = Conv(2 * inner, c2, 1)
        self.m = nn.Sequential(*(BottleneckTransformer(inner, inner, resolution=(w, h), expansion=e2, pos_emb=pos_emb) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, H, W)."""
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], dim=1))


@register("BoTPaperAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class BoTPaperAttention(nn.Module):
    """The paper's self-attention (figure 4): logits q·k + q·r, q scaled by 1 / sqrt(d) before both terms, no output projection.

    Relative: r = ``rel_height[y' - y]`` + ``rel_width[x' - x]`` from a query at (y, x) to a key at (y', x'), tables shared by the heads.
    Absolute: r = ``height[y']`` + ``width[x']``. Both are folded into query and key, so that no N x N matrix is built: an absolute
    position is added to the key; for relative ones the query gets its products with all rows and columns beside it, and the key a one in
    the place of its own. Tables are resized to the map at hand.

    Args:
        dim: channels in.
        fmap_size: height and width that the tables are made for.
        heads: number of heads.
        dim_head: channels of a head; None for ``dim // heads``, so that the width stays (a YAML row keeps its width).
        rel_pos_emb: relative positions, as in the paper; else absolute.

    Raises:
        ValueError: heads that do not divide the channels, with ``dim_head`` None.
    """

    def __init__(
        self,
        dim: int,
        fmap_size: Sequence[int] = (14, 14),
        heads: int = 4,
        dim_head: int | None = None,
        rel_pos_emb: bool = True,
    ) -> None:
        super().__init__()
        if dim_head is None and dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} channels")
        dim_head = dim_head or dim // heads
        self.heads, self.dim_head, self.scale = heads, dim_head, dim_head**-0.5
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        table = _RelativePositions if rel_pos_emb else _AbsolutePositions
        self.pos_emb = table(fmap_size, dim_head)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, heads * dim_head, H, W)."""
        batch, _, height, width = x.shape
        query, key, value = self._projected(x)
        out = fused_attention(query, key, value, scale=1.0)  # (B, heads, N, d)
        return out.transpose(2, 3).reshape(batch, self.heads * self.dim_head, height, width)

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """The affinities of one pixel to all others."""
        return head_maps(self.weights_of(x, query), (x.shape[2], x.shape[3]))

    def weights_of(self, x: Tensor, query: Query) -> Tensor:
        """What one pixel gives each pixel's value: (1, C, H, W) -> (heads, H W)."""
        queries, keys, _ = self._projected(x)
        return query_weights(queries[0, :, query.cell_number(x.shape[2], x.shape[3])], keys[0], scale=1.0)

    def _projected(self, x: Tensor) -> list[Tensor]:
        """Query and key with the positions in them, and value: each (B, heads, H W, ·)."""
        batch, _, height, width = x.shape
        qkv = self.to_qkv(x).reshape(batch, 3, self.heads, self.dim_head, height, width)
        query, key, value = qkv.permute(1, 0, 2, 4, 5, 3)  # (B, heads, H, W, d)
        query, key = self.pos_emb(query * self.scale, key)
        return [part.flatten(2, 3) for part in (query, key, value)]


@register("BoTPaperBlock", channels=rules.out_width, kind="attention", paper=PAPER)
class BoTPaperBlock(nn.Module):
    """The paper's bottleneck: 1x1 convolution, attention, 1x1 convolution, each with batch norm, and a residual (figure 3).

    Args:
        dim: channels in.
        dim_out: channels out; None for ``dim``.
        fmap_size: height and width that the position tables are made for.
        proj_factor: channels out per channel of the bottleneck.
        downsample: halve the map, by average pooling after the attention (a 3x3 convolution of stride 2 in the shortcut).
        heads: heads of the attention.
        dim_head: channels of a head.
        rel_pos_emb: relative positions, as in the paper; else absolute.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        fmap_size: Sequence[int] = (14, 14),
        proj_factor: int = 4,
        downsample: bool = False,
        heads: int = 4,
        dim_head: int = 128,
        rel_pos_emb: bool = True,
    ) -> None:
        super().__init__()
        dim_out = dim_out or dim
        inner, attended = dim_out // proj_factor, heads * dim_head
        kernel, stride, padding = (3, 2, 1) if downsample else (1, 1, 0)
        project = dim != dim_out or downsample
        self.shortcut = (
            nn.Sequential(nn.Conv2d(dim, dim_out, kernel, stride, padding, bias=False), nn.BatchNorm2d(dim_out), nn.ReLU())
            if project
            else nn.Identity()
        )
        last_norm = nn.BatchNorm2d(dim_out)
        nn.init.zeros_(last_norm.weight)
        self.net = nn.Sequential(
            nn.Conv2d(dim, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            BoTPaperAttention(inner, fmap_size, heads, dim_head, rel_pos_emb),
            HalvingMean() if downsample else nn.Identity(),
            nn.BatchNorm2d(attended),
            nn.ReLU(),
            nn.Conv2d(attended, dim_out, 1, bias=False),
            last_norm,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, dim_out, H, W), or half of H and W, rounded up, with ``downsample``."""
        return F.relu(self.net(x) + self.shortcut(x))


class HalvingMean(nn.Module):
    """The mean of each 2 x 2 pixels: (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""

    def forward(self, x: Tensor) -> Tensor:
        return window_means(x, 2)


class _AbsolutePositions(nn.Module):
    """q·(k + height[y'] + width[x']): positions added to the keys."""

    def __init__(self, fmap_size: Sequence[int], dim: int) -> None:
        super().__init__()
        self.height = nn.Parameter(torch.randn(fmap_size[0], dim) * dim**-0.5)
        self.width = nn.Parameter(torch.randn(fmap_size[1], dim) * dim**-0.5)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Two times (B, heads, H, W, d) -> the same shapes, with the position folded in."""
        rows = resize_matrix(self.height.shape[0], key.shape[2], like=self.height) @ self.height  # (H, d)
        columns = resize_matrix(self.width.shape[0], key.shape[3], like=self.width) @ self.width  # (W, d)
        return query, key + (rows.unsqueeze(1) + columns).to(key.dtype)


class _RelativePositions(nn.Module):
    """q·(k + rel_height[y' - y] + rel_width[x' - x])."""

    def __init__(self, fmap_size: Sequence[int], dim: int) -> None:
        super().__init__()
        self.rel_height = nn.Parameter(torch.randn(2 * fmap_size[0] - 1, dim) * dim**-0.5)
        self.rel_width = nn.Parameter(torch.randn(2 * fmap_size[1] - 1, dim) * dim**-0.5)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Two times (B, heads, H, W, d) -> two times (B, heads, H, W, d + H + W), with the position folded in."""
        height, width = query.shape[2:4]
        by_row = query @ self._pairs(self.rel_height, height).transpose(1, 2)  # with (H, d, H) -> (B, heads, H, W, H)
        by_column = query.transpose(2, 3) @ self._pairs(self.rel_width, width).transpose(1, 2)  # (B, heads, W, H, W)
        own_row = _one_hot_rows(key[..., 0, 0]).unsqueeze(1).expand(-1, width, -1)  # (H, W, H)
        own_column = _one_hot_rows(key[..., 0, :, 0]).expand(height, -1, -1)  # (H, W, W)
        own = torch.cat([own_row, own_column], dim=-1) + torch.zeros_like(key[..., :1])  # for every image and head
        return torch.cat([query, by_row, by_column.transpose(2, 3)], dim=-1), torch.cat([key, own], dim=-1)

    @staticmethod
    def _pairs(table: Tensor, size: int) -> Tensor:
        """table[j - i] for all places i of a query and j of a key: (2 n - 1, d) -> (size, size, d)."""
        resized = resize_matrix(table.shape[0], 2 * size - 1, like=table) @ table
        place = torch.arange(size, device=table.device)
        return F.embedding(place - place.unsqueeze(1) + (size - 1), resized)


def _one_hot_rows(like: Tensor) -> Tensor:
    """The identity (n, n) for ``like`` of (..., n)."""
    place = torch.arange(like.shape[-1], device=like.device)
    return (place.unsqueeze(1) == place).to(like.dtype)
