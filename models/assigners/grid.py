"""The cell centres of a head's maps in image pixels, and the box distances that a distribution predicts."""

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
    axes: Tensor  # (2, L, S) centres of the columns and of the rows of each level, px, padded with infinity
    columns: Tensor  # (L,) int64 cells a row
    first: Tensor  # (L,) int64 the level's first cell


def level_grid(maps: Sequence[Tensor], strides: Sequence[float], *, device: torch.device | None = None) -> LevelGrid:
    """The grid of maps (…, H, W), on their device unless another is given.

    It is made once for each size, since a step would wait for its copies.
    """
    sizes = tuple((int(level.shape[-2]), int(level.shape[-1])) for level in maps)
    return _level_grid(sizes, tuple(float(s) for s in strides), device or maps[0].device)


@lru_cache(maxsize=64)
def _level_grid(sizes: tuple[tuple[int, int], ...], strides: tuple[float, ...], device: torch.device) -> LevelGrid:
    with torch.inference_mode(mode=False):  # kept beyond the call, and read with gradients
        centres, steps = anchor_points([torch.empty(1, 1, h, w) for h, w in sizes], strides)
        axes = torch.full((2, len(sizes), max(max(size) for size in sizes)), torch.inf)
        for number, ((h, w), stride) in enumerate(zip(sizes, strides)):
            for axis, length in enumerate((w, h)):
                axes[axis, number, :length] = (torch.arange(length) + 0.5) * stride
        counts = torch.tensor([h * w for h, w in sizes])
        columns = torch.tensor([w for _, w in sizes])
        grid = LevelGrid(centres, steps, axes, columns, counts.cumsum(0) - counts)
        return LevelGrid(*(t.to(device, non_blocking=True) for t in grid))


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
