"""YOLOv5's assignment: a box is assigned to the anchors of similar shape, in its cell and the adjacent cells.

Source: YOLOv5 and YOLOv7 (arXiv 2207.02696). An anchor fits a box if neither width nor height differ by more than a factor
``anchor_t``. Besides the cell of a box's centre, the left, upper, right and lower neighbours are assigned if the centre is within
``reach`` of a cell of them (0.5: the nearer neighbour in each direction; 1: all of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.assigners.targets import PaddedTargets, can_count_without_wait


class AnchorGrid(NamedTuple):
    """The A places of an anchor-based head: one per level, anchor and cell, in this order, cells row by row."""

    corner_px: Tensor  # (A, 2) x and y of the cell's left top corner
    anchor_px: Tensor  # (A, 2) width and height of the anchor
    stride: Tensor  # (A,) px
    level: Tensor  # (A,) int64
    sizes: tuple[tuple[int, int], ...]  # rows and columns of each level


class Matches(NamedTuple):
    """Assigned places, R per image, valid where ``mask`` is true. A place may occur more than once: the last one is used."""

    place: Tensor  # (B, R) int64, index into the grid
    box: Tensor  # (B, R) int64, index of the image's box
    mask: Tensor  # (B, R) bool

    def compact(self) -> Matches:
        """On the CPU, drops the columns that are valid on no image; on a GPU, where counting them would synchronise, keeps all."""
        if not can_count_without_wait(self.mask):
            return self
        order = (~self.mask).to(torch.uint8).sort(dim=1, stable=True).indices[:, : int(self.mask.sum(dim=1).max())]
        return Matches(*(t.gather(1, order) for t in self))


class Scene(NamedTuple):
    """The inputs of an assigner for anchor-based heads."""

    maps: Sequence[Tensor]  # raw maps of the main branch, (B, anchors * outputs, H, W)
    grid: AnchorGrid
    anchors: Tensor  # (levels, anchors a cell, 2) in strides
    strides: Sequence[float]  # px
    targets: PaddedTargets
    auxiliary: bool  # whether the matches are for an auxiliary branch


def anchor_grid(maps: Sequence[Tensor], anchors: Tensor, strides: Sequence[float]) -> AnchorGrid:
    """The places of maps (…, H, W).

    Args:
        maps: one a level.
        anchors: (levels, anchors a cell, 2) width and height in strides.
        strides: px a cell of each level.
    """
    per_cell, device = anchors.shape[1], anchors.device
    corners, shapes, steps, levels, sizes = [], [], [], [], []
    for number, (level, stride) in enumerate(zip(maps, strides)):
        h, w = level.shape[-2:]
        y, x = torch.meshgrid(*(torch.arange(n, device=device, dtype=torch.float32) * stride for n in (h, w)), indexing="ij")
        corners.append(torch.stack((x, y), dim=-1).flatten(0, 1).repeat(per_cell, 1))
        shapes.append((anchors[number].float() * stride).repeat_interleave(h * w, dim=0))
        steps.append(torch.full((per_cell * h * w,), stride, device=device))
        levels.append(torch.full((per_cell * h * w,), number, device=device))
        sizes.append((h, w))
    return AnchorGrid(torch.cat(corners), torch.cat(shapes), torch.cat(steps), torch.cat(levels), tuple(sizes))


def decode_places(raw: Tensor, grid: AnchorGrid, place: Tensor | slice = slice(None)) -> Tensor:
    """Raw box outputs (B, 4, R) of places (B, R), or of all in order, to boxes (B, R, 4) xyxy px.

    Centre = corner + (2σ − 0.5) · stride and size = (2σ)² · anchor, σ the sigmoid of the output (YOLOv5, release 5.0).
    """
    corner, anchor, stride = grid.corner_px[place], grid.anchor_px[place], grid.stride[place]
    xy, wh = raw.sigmoid().transpose(-1, -2).split(2, dim=-1)  # (B, R, 2)
    centre = corner + (2 * xy - 0.5) * stride[..., None]
    half = (2 * wh) ** 2 * anchor / 2
    return torch.cat((centre - half, centre + half), dim=-1)


@torch.no_grad()
def assign_by_ratio(scene: Scene, *, anchor_t: float = 4.0, reach: float = 0.5) -> Matches:
    """All matches of a batch, levels in order; within a level by direction, then anchor, then box.

    Args:
        scene: targets and grid; predictions are not used.
        anchor_t: largest ratio of a box's side and the anchor's.
        reach: how near the centre must be to a neighbour, in cells.
    """
    targets, anchors = scene.targets, scene.anchors
    low, high = targets.boxes_xyxy.split(2, dim=-1)
    unit = torch.eye(2, device=low.device)
    directions = torch.cat((torch.zeros_like(unit[:1]), -unit, unit))  # (5, 2) cells: none, left, up, right, down
    found, begin = [], 0
    for number, ((h, w), stride) in enumerate(zip(scene.grid.sizes, scene.strides)):
        per_cell = anchors.shape[1]
        centre, size = (low + high) / 2 / stride, (high - low) / stride  # (B, n, 2) cells
        ratio = size[:, None] / anchors[number].float()[:, None]  # (B, anchors, n, 2)
        fits = (torch.maximum(ratio, 1 / ratio).amax(dim=-1) < anchor_t) & targets.valid[:, None]
        cell = (centre[:, None] + directions[:, None] * reach).long()  # (B, 5, n, 2)
        extent = _filled((w, h), device=low.device)
        cell = torch.minimum(cell.clamp(min=0), extent - 1)
        near = _near(centre, extent, reach)  # (B, 5, n)
        offset = torch.arange(per_cell, device=low.device)[:, None] * (h * w) + begin
        place = (cell[..., 1] * w + cell[..., 0])[:, :, None] + offset  # (B, 5, anchors, n)
        mask = near[:, :, None] & fits[:, None]
        box = torch.arange(low.shape[1], device=low.device).expand_as(place)
        found.append(tuple(t.flatten(1) for t in (place, box, mask)))
        begin += per_cell * h * w
    return Matches(*(torch.cat(t, dim=1) for t in zip(*found)))


def _filled(values: tuple[int, int], *, device: torch.device) -> Tensor:
    """Two numbers (2,) int64 on a device, without a copy from the host."""
    out = torch.full((2,), values[0], device=device)
    out[1:] = values[1]
    return out


def _near(centre: Tensor, extent: Tensor, reach: float) -> Tensor:
    """Whether the cell itself (always) and its four neighbours are within reach of centres (B, n, 2) in cells: (B, 5, n) bool."""
    from_end = extent - centre
    low = (centre % 1 < reach) & (centre > 1)
    high = (from_end % 1 < reach) & (from_end > 1)
    itself = torch.ones_like(low[..., 0])
    return torch.stack((itself, low[..., 0], low[..., 1], high[..., 0], high[..., 1]), dim=1)
