"""Reading and writing single places of a head's maps: a place counts over levels, anchors and cells, in this order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_VALUES = 1 << 22  # values gathered at once: bounds the memory of their indices


def gather_places(maps: Sequence[Tensor], place: Tensor, outputs: int) -> Tensor:
    """Values (B, outputs, R) of places (B, R): indices over levels, anchors and cells, in this order."""
    parts = place.split(max(1, MAX_VALUES // max(1, outputs * len(place))), dim=1)
    return _gather(maps, place, outputs) if len(parts) == 1 else torch.cat([_gather(maps, part, outputs) for part in parts], dim=2)


def _gather(maps: Sequence[Tensor], place: Tensor, outputs: int) -> Tensor:
    total = maps[0].new_zeros(len(place), outputs, place.shape[1])
    for level, index, here in _by_level(maps, place, outputs):
        total += level.gather(2, index.expand(-1, level.shape[1], -1)).view_as(total) * here
    return total


def scatter_add_places(maps: Sequence[Tensor], place: Tensor, values: Tensor) -> None:
    """Adds values (B, outputs, R) to contiguous maps at places (B, R), in place."""
    for level, index, here in _by_level(maps, place, values.shape[1]):
        level.scatter_add_(2, index.expand(-1, level.shape[1], -1), (values * here).view(len(values), level.shape[1], -1))


def _by_level(maps: Sequence[Tensor], place: Tensor, outputs: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each level as (B, outputs, cells) with the cells' index (B, 1, R), or, where a cell has several anchors and no such view exists,
    as (B, 1, values) with the values' index (B, 1, outputs · R); and whether the places are in the level, (B, 1, R)."""
    levels, start = [], 0
    for level in maps:
        cells = level.shape[2] * level.shape[3]
        count = level.shape[1] // outputs * cells
        here = (place >= start) & (place < start + count)
        index = (place - start).clamp(0, count - 1)[:, None]
        if count == cells:
            view = level.flatten(2)
        else:
            anchor = torch.div(index, cells, rounding_mode="floor")
            channel = torch.arange(outputs, device=place.device)[:, None]
            index = (anchor * (outputs - 1) * cells + index + channel * cells).flatten(1)[:, None]
            view = level.flatten(1)[:, None]
        levels.append((view, index, here[:, None]))
        start += count
    return levels
