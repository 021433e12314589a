"""The cell centres of a head's maps in image pixels, and the box distances that a distribution predicts."""

from __future__ import annotations

from collections.abc import Sequence

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
