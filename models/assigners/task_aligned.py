"""Task-aligned assignment: a box is learnt by the cells inside it whose class score and box already agree with it best.

TOOD: Task-aligned One-stage Object Detection, arXiv 2108.07755. Alignment of a cell with a box is t = s^α · u^β (equation 3), s the score
of the box's class and u the overlap (CIoU) of the predicted box with it. Each box takes its ``topk`` best cells; a cell that several
boxes want goes to the one that it overlaps most. The soft target of a cell is its t scaled so that the best of a box's cells gets the
box's largest overlap (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.assigners.targets import PaddedTargets
from models.losses.iou import ciou

MAX_PAIRS = 1 << 24  # pairs of boxes and cells that are looked at together: bounds the memory whatever the batch holds
INSIDE_EPS = 1e-9  # px that a cell's centre is inside a box at least


class Assignment(NamedTuple):
    """Which cells learn which boxes, as R = n · topk picks an image; a pick counts where ``mask`` is true, and no cell counts twice.

    Picks of fewer cells (a box that contains few, an image with few boxes) are filled up with masked ones.
    """

    cell: Tensor  # (B, R) int64, index of the cell over all levels
    box: Tensor  # (B, R) int64, index of the image's box
    score: Tensor  # (B, R) target score for the box's class in 0-1, 0 where masked
    mask: Tensor  # (B, R) bool


class _Owners(NamedTuple):
    """For each cell (B, N) the box that it overlaps most: how much, which, and how well it is aligned with that box."""

    overlap: Tensor
    box: Tensor
    alignment: Tensor


class TaskAlignedAssigner:
    """Assigns boxes to cells.

    Args:
        topk: cells a box.
        alpha: exponent of the class score.
        beta: exponent of the overlap.
        min_candidate_side: px; for a box with a shorter side, cells are looked for in an area enlarged to this length about its centre.
    """

    def __init__(self, *, topk: int = 10, alpha: float = 0.5, beta: float = 6.0, min_candidate_side: float = 0.0) -> None:
        self.topk, self.alpha, self.beta = topk, alpha, beta
        self.min_candidate_side = min_candidate_side

    @torch.no_grad()
    def __call__(self, boxes_xyxy: Tensor, class_logits: Sequence[Tensor], points: Tensor, targets: PaddedTargets) -> Assignment:
        """Assigns the targets of a whole batch.

        Args:
            boxes_xyxy: (B, N, 4) px, predicted.
            class_logits: one (B, nc, H, W) a level.
            points: (2, N) px, centres of the cells.
            targets: n boxes an image.
        """
        (batch, n), cells = targets.valid.shape, points.shape[1]
        topk = min(self.topk, cells)
        zeros = boxes_xyxy.new_zeros(batch, cells)
        owners = _Owners(zeros, torch.zeros_like(zeros, dtype=torch.long), zeros)
        picks: list[tuple[Tensor, ...]] = []  # alignment, cell, overlap of (B, part, topk)
        step = max(1, MAX_PAIRS // max(1, batch * cells))
        for start in range(0, n, step):
            part = PaddedTargets(*(t[:, start : start + step] for t in targets))
            alignment, overlap = self._alignment(boxes_xyxy, class_logits, points, part)  # (B, part, N)
            owners = _stronger(owners, alignment, overlap, start)
            value, cell = alignment.topk(topk, dim=-1)
            picks.append((value, cell, overlap.gather(-1, cell)))
        if not picks:
            none = zeros[:, :0]
            return Assignment(none.long(), none.long(), none, none.bool())
        value, cell, overlap = (torch.cat(p, dim=1).flatten(1) for p in zip(*picks))  # (B, n * topk)
        return _resolve(value, cell, overlap, owners, n)

    def _alignment(
        self, boxes_xyxy: Tensor, class_logits: Sequence[Tensor], points: Tensor, targets: PaddedTargets
    ) -> tuple[Tensor, Tensor]:
        """Alignment and overlap (B, n, N) of every box with every cell, 0 where the cell is not inside the box.

        On the CPU only the pairs inside are computed. A GPU computes all of them, rather than wait to learn how many are inside.
        """
        inside = self._inside(points, targets)  # (B, n, N)
        image = torch.arange(len(inside), device=inside.device)[:, None]
        logits = torch.cat([level[image, targets.labels].flatten(2) for level in class_logits], dim=2)  # (B, n, N)
        if inside.device.type == "cpu":
            flat = inside.flatten().nonzero().squeeze(1)
            row, cell = flat // inside.shape[2], flat % inside.shape[2]
            predicted = boxes_xyxy.flatten(0, 1)[row // inside.shape[1] * inside.shape[2] + cell]
            pairs = self._measure(predicted, targets.boxes_xyxy.flatten(0, 1)[row], logits.flatten()[flat])
            return tuple(torch.zeros_like(logits).flatten().index_copy_(0, flat, v).view_as(logits) for v in pairs)  # type: ignore[return-value]
        alignment, overlap = self._measure(boxes_xyxy[:, None], targets.boxes_xyxy[:, :, None], logits)
        return alignment * inside, overlap * inside

    def _measure(self, predicted_xyxy: Tensor, true_xyxy: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        overlap = ciou(predicted_xyxy, true_xyxy).clamp_(min=0)
        return logits.float().sigmoid().pow_(self.alpha).mul_(overlap.pow(self.beta)), overlap

    def _inside(self, points: Tensor, targets: PaddedTargets) -> Tensor:
        """Which cells' centres (2, N) are candidates for which boxes: (B, n, N) bool."""
        low, high = targets.boxes_xyxy.split(2, dim=-1)  # (B, n, 2)
        centre, half = (low + high) / 2, ((high - low) / 2).clamp(min=self.min_candidate_side / 2)
        half = torch.where(high - low < self.min_candidate_side, half, (high - low) / 2)
        low, high = centre - half, centre + half
        inside = targets.valid[..., None]
        for axis in range(2):
            coordinate = points[axis]
            inside = inside & (coordinate > low[..., axis, None] + INSIDE_EPS) & (coordinate < high[..., axis, None] - INSIDE_EPS)
        return inside


def _stronger(owners: _Owners, alignment: Tensor, overlap: Tensor, start: int) -> _Owners:
    """The owners after also looking at the boxes ``start`` …, whose measures are (B, part, N)."""
    largest, box = overlap.max(dim=1)
    better = largest > owners.overlap
    at_box = alignment.gather(1, box[:, None]).squeeze(1)
    return _Owners(*(torch.where(better, new, old) for new, old in zip((largest, box + start, at_box), owners)))


def _resolve(value: Tensor, cell: Tensor, overlap: Tensor, owners: _Owners, n: int) -> Assignment:
    """Settles which box a cell learns that several picked, and turns alignments into target scores.

    Args:
        value: (B, R) alignment of each pick, R = n · topk, box by box; 0 for a pick that is none.
        cell: (B, R) cell of each pick.
        overlap: (B, R) overlap of each pick.
        owners: for each cell the box that it overlaps most.
        n: boxes an image.
    """
    box = torch.arange(n, device=cell.device).repeat_interleave(cell.shape[1] // n).expand_as(cell)
    picked = value > 0
    first = torch.full_like(owners.box, n).scatter_reduce_(1, cell, torch.where(picked, box, n), "amin")  # (B, N)
    last = torch.full_like(owners.box, -1).scatter_reduce_(1, cell, torch.where(picked, box, -1), "amax")
    mask = picked & (box == first.gather(1, cell))  # each picked cell once
    contested = (first < last).gather(1, cell)
    box = torch.where(contested, owners.box.gather(1, cell), box)
    value = torch.where(contested, owners.alignment.gather(1, cell), value) * mask
    overlap = torch.where(contested, owners.overlap.gather(1, cell), overlap) * mask
    most_aligned, most_overlap = (v.new_zeros(len(v), n).scatter_reduce_(1, box, v, "amax") for v in (value, overlap))  # (B, n)
    score = value * (most_overlap / (most_aligned + 1e-9)).gather(1, box)
    return Assignment(cell, box, score, mask)
