"""The cells of a head's maps in image pixels and in the order of the loss's tables, and the box distances that a distribution predicts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


def anchor_points(maps: Sequence[Tensor], strides: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Centres and strides of all cells, levels in order, cells row by row.

    Computed from the maps at every call, so that a traced graph follows other image sizes.

    Args:
        maps: one (B, C, H, W) a level.
        strides: px a cell, one a level.

    Returns:
        centres (2, N) x and y in px, and strides (1, N) px, both float32.
    """
    points, sizes = [], []
    for level, stride in zip(maps, strides):
        h, w = level.shape[-2:]
        y, x = (torch.arange(n, device=level.device, dtype=torch.float32) + 0.5 for n in (h, w))
        grid = torch.stack((x.expand(h, w), y[:, None].expand(h, w))).flatten(1) * stride  # (2, h * w)
        points.append(grid)
        sizes.append(torch.full_like(grid[:1], stride))
    return torch.cat(points, dim=1), torch.cat(sizes, dim=1)


class LevelGrid(NamedTuple):
    """What the maps of N cells in L levels are like; the same for every batch of one size."""

    centres: Tensor  # (2, N) x and y, px
    strides: Tensor  # (1, N) px
    axes: Tensor  # (4, L, S) px, rising: x of the columns, y of the rows, −x, −y of each level, padded with infinity
    sizes: Tensor  # (2, L, 1) int64 columns and rows of each level
    first: Tensor  # (L, 1) int64 the level's first cell


class RowOrder(NamedTuple):
    """The T = K · B · N cells of a batch as rows of a table: branch by branch, in each level by level, in each image by image.

    So a level's rows are its map (B, C, H, W) in channels-last memory: neither reading it nor its gradient moves a value.
    """

    row: Tensor  # (T,) int64, the row of each image's cells, image by image
    centre: Tensor  # (T, 4) px, the row's centre: x, y, x, y
    reach: Tensor  # (T, 4) px, its stride: negative for left and top, positive for right and bottom


def level_grid(maps: Sequence[Tensor], strides: Sequence[float], *, device: torch.device | None = None) -> LevelGrid:
    """The grid of maps (…, H, W), on their device unless another is given.

    It is made once for each size, since a step would wait for its copies.
    """
    return _level_grid(_sizes(maps), tuple(float(s) for s in strides), device or maps[0].device)


def row_order(maps: Sequence[Tensor], strides: Sequence[float], *, branches: int = 1) -> RowOrder:
    """The order of rows for maps (B, …, H, W) of each of K branches, made once for each size and batch size."""
    return _row_order(_sizes(maps), tuple(float(s) for s in strides), (branches, len(maps[0])), maps[0].device)


def _sizes(maps: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((int(level.shape[-2]), int(level.shape[-1])) for level in maps)


@lru_cache(maxsize=64)
def _level_grid(sizes: tuple[tuple[int, int], ...], strides: tuple[float, ...], device: torch.device) -> LevelGrid:
    with torch.inference_mode(mode=False):  # kept beyond the call, and read with gradients
        centres, steps = anchor_points([torch.empty(1, 1, h, w) for h, w in sizes], strides)
        axes = torch.full((4, len(sizes), max(max(size) for size in sizes)), torch.inf)
        for number, ((h, w), stride) in enumerate(zip(sizes, strides)):
            for axis, length in enumerate((w, h)):
                places = (torch.arange(length) + 0.5) * stride
                axes[axis, number, :length], axes[axis + 2, number, :length] = places, -places.flip(0)
        counts = torch.tensor([h * w for h, w in sizes])
        extents = torch.tensor([[w for _, w in sizes], [h for h, _ in sizes]])
        grid = LevelGrid(centres, steps, axes, extents[..., None], (counts.cumsum(0) - counts)[:, None])
        return LevelGrid(*(t.to(device, non_blocking=True) for t in grid))


@lru_cache(maxsize=16)
def _row_order(sizes: tuple[tuple[int, int], ...], strides: tuple[float, ...], copies: tuple[int, int], device: torch.device) -> RowOrder:
    grid = level_grid([torch.empty(0, h, w) for h, w in sizes], strides, device=torch.device("cpu"))
    branches, batch = copies
    with torch.inference_mode(mode=False):
        counts = [h * w for h, w in sizes]
        levels = torch.arange(sum(counts)).split(counts)
        cell = torch.cat([level.repeat(batch) for level in levels])
        image = torch.cat([torch.arange(batch).repeat_interleave(len(level)) for level in levels])
        row = torch.empty_like(cell)
        row[image * sum(counts) + cell] = torch.arange(len(cell))
        row = (torch.arange(branches)[:, None] * len(row) + row).flatten()
        centre, stride = grid.centres.T[cell].repeat(branches, 1), grid.strides.T[cell].repeat(branches, 1)
        order = RowOrder(row, torch.cat((centre, centre), dim=1), torch.cat((-stride, -stride, stride, stride), dim=1))
        return RowOrder(*(t.to(device, non_blocking=True) for t in order))


def expected_distances(logits: Tensor, projection: Tensor) -> Tensor:
    """Mean of each side's distribution, in float32 also where a matrix product would be rounded (autocast, half weights).

    Args:
        logits: (B, 4 * bins, N), side by side.
        projection: the bins' values, in any shape.

    Returns:
        (B, 4, N) distances left, top, right, bottom in strides (arXiv 2006.04388, equation 3).
    """
    bins = projection.numel()
    probabilities = logits.float().unflatten(1, (4, bins)).softmax(dim=2)
    return (probabilities * projection.float().reshape(bins, 1)).sum(dim=2)


def expected_distances_of_rows(logits: Tensor, projection: Tensor) -> Tensor:
    """The same for float32 rows (R, 4, bins) and values (bins,): (R, 4)."""
    probabilities = logits.softmax(dim=2)
    if logits.device.type == "cpu":
        return probabilities @ projection
    return (probabilities * projection).sum(dim=2)  # a product of matrices may be rounded to TF32
