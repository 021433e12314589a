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

from models.assigners.targets import PaddedTargets, boxes_at
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
    """For each cell the box that it overlaps most: how much, which (n for none), and how well it is aligned with that box; (B, N) each."""

    overlap: Tensor
    box: Tensor
    alignment: Tensor


class _Pairs(NamedTuple):
    """Boxes and cells of one level that may belong together, P of them."""

    row: Tensor  # (P,) box, counted over the images
    cell: Tensor  # (P,) cell within the level
    inside: Tensor | None  # (P,) whether the cell's centre is inside the box; None: all are


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
    def __call__(self, boxes_xyxy: Tensor, class_logits: Sequence[Tensor], strides: Sequence[float], targets: PaddedTargets) -> Assignment:
        """Assigns the targets of a whole batch.

        Args:
            boxes_xyxy: (B, N, 4) px, predicted; levels in order, cells row by row.
            class_logits: one (B, nc, H, W) a level.
            strides: px a cell of each level.
            targets: n boxes an image.
        """
        batch, n = targets.valid.shape
        cells = boxes_xyxy.shape[1]
        zeros = boxes_xyxy.new_zeros(batch, cells)
        owners = _Owners(zeros, torch.full_like(zeros, n, dtype=torch.long), zeros)
        picks: list[tuple[Tensor, ...]] = []  # alignment and cell, (B, part, topk) each
        step = max(1, MAX_PAIRS // max(1, batch * cells))
        for start in range(0, n, step):
            part = PaddedTargets(*(t[:, start : start + step] for t in targets))
            alignment, owners = self._align(boxes_xyxy, class_logits, strides, part, owners, start)
            picks.append(alignment.topk(min(self.topk, cells), dim=-1))
        if not picks:
            none = zeros[:, :0]
            return Assignment(none.long(), none.long(), none, none.bool())
        value, cell = (torch.cat(p, dim=1).flatten(1) for p in zip(*picks))  # (B, n * topk)
        box = torch.arange(n, device=cell.device).repeat_interleave(cell.shape[1] // n).expand_as(cell)
        return _resolve(box, cell, value, owners, boxes_xyxy, targets)

    def _align(
        self,
        boxes_xyxy: Tensor,
        class_logits: Sequence[Tensor],
        strides: Sequence[float],
        targets: PaddedTargets,
        owners: _Owners,
        start: int,
    ) -> tuple[Tensor, _Owners]:
        """Alignment (B, n, N) of some boxes, the first of which is number ``start`` of its image, and the owners after seeing them."""
        batch, n = targets.valid.shape
        boxes, labels = targets.boxes_xyxy.reshape(-1, 4), targets.labels.reshape(-1)
        alignment = boxes_xyxy.new_zeros(batch, n, boxes_xyxy.shape[1])
        updated, begin = [], 0
        for logits, stride in zip(class_logits, strides):
            count = logits.shape[2] * logits.shape[3]
            of_level = slice(begin, begin + count)
            pairs = self._candidates(targets, logits.shape[2:], stride)
            image = torch.div(pairs.row, n, rounding_mode="floor")
            cell = image * count + pairs.cell  # over the images
            overlap = ciou(boxes_xyxy[:, of_level].reshape(-1, 4)[cell], boxes[pairs.row]).clamp_(min=0)
            if pairs.inside is not None:
                overlap = overlap * pairs.inside
            score = logits.reshape(-1)[(image * logits.shape[1] + labels[pairs.row]) * count + pairs.cell].float().sigmoid()
            values = overlap.new_zeros(batch * n, count)
            values.view(-1)[pairs.row * count + pairs.cell] = score.pow_(self.alpha) * overlap.pow(self.beta)
            alignment[..., of_level] = values.view(batch, n, count)
            old = _Owners(*(o[:, of_level] for o in owners))
            updated.append(_stronger(old, overlap, cell, pairs.row - image * n, alignment[..., of_level], start))
            begin += count
        return alignment, _Owners(*(torch.cat(u, dim=1) for u in zip(*updated)))

    def _candidates(self, targets: PaddedTargets, hw: Sequence[int], stride: float) -> _Pairs:
        """The cells of a level whose centres are inside the boxes.

        The CPU lists just these; a GPU lists all cells with all boxes, rather than wait to learn how many are inside.
        """
        low, high = targets.boxes_xyxy.reshape(-1, 4).split(2, dim=1)  # (rows, 2)
        missing = (self.min_candidate_side - (high - low)).clamp(min=0) / 2
        low, high, valid = low - missing, high + missing, targets.valid.reshape(-1)
        (h, w), device = hw, low.device
        x, y = ((torch.arange(size, device=device) + 0.5) * stride for size in (w, h))
        if device.type != "cpu":
            across, down = (
                (axis > low[:, i, None] + INSIDE_EPS) & (axis < high[:, i, None] - INSIDE_EPS) for i, axis in enumerate((x, y))
            )
            inside = (across[:, None, :] & down[:, :, None] & valid[:, None, None]).flatten()
            rows = torch.arange(len(low), device=device)[:, None].expand(-1, h * w)
            return _Pairs(rows.reshape(-1), torch.arange(h * w, device=device).repeat(len(low)), inside)
        x0, y0 = (torch.searchsorted(axis, low[:, i] + INSIDE_EPS, right=True) for i, axis in enumerate((x, y)))
        x1, y1 = (torch.searchsorted(axis, high[:, i] - INSIDE_EPS) for i, axis in enumerate((x, y)))
        across = (x1 - x0).clamp(min=0) * valid
        count = across * (y1 - y0).clamp(min=0)
        row = torch.repeat_interleave(torch.arange(len(count)), count)
        order = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
        down = torch.div(order, across[row], rounding_mode="floor")
        return _Pairs(row, (y0[row] + down) * w + x0[row] + order - down * across[row], None)


def _stronger(owners: _Owners, overlap: Tensor, cell: Tensor, box: Tensor, alignment: Tensor, start: int) -> _Owners:
    """The owners (B, N) of a level's cells after also looking at pairs: overlap, cell over the images, box of the chunk; (P,) each."""
    largest = torch.zeros_like(owners.overlap).flatten().scatter_reduce_(0, cell, overlap, "amax")
    none = alignment.shape[1]
    wanted = torch.where((overlap > 0) & (overlap == largest[cell]), box, none)
    best = torch.full_like(largest, none, dtype=torch.long).scatter_reduce_(0, cell, wanted, "amin").view_as(owners.box)
    largest = largest.view_as(owners.overlap)
    at_best = alignment.gather(1, best.clamp(max=none - 1)[:, None]).squeeze(1)
    better = largest > owners.overlap
    return _Owners(*(torch.where(better, new, old) for new, old in zip((largest, best + start, at_best), owners)))


def _resolve(box: Tensor, cell: Tensor, value: Tensor, owners: _Owners, boxes_xyxy: Tensor, targets: PaddedTargets) -> Assignment:
    """Settles which box a cell learns that several picked, and turns alignments into target scores.

    Args:
        box: (B, R) picking box.
        cell: (B, R) picked cell.
        value: (B, R) their alignment; 0 for a pick that is none.
        owners: for each cell the box that it overlaps most.
        boxes_xyxy: (B, N, 4) px, predicted.
        targets: n boxes an image.
    """
    n = targets.valid.shape[1]
    picked = value > 0
    first = torch.full_like(owners.box, n).scatter_reduce_(1, cell, torch.where(picked, box, n), "amin")  # (B, N)
    last = torch.full_like(owners.box, -1).scatter_reduce_(1, cell, torch.where(picked, box, -1), "amax")
    mask = picked & (box == first.gather(1, cell))  # each picked cell once
    contested = mask & (first < last).gather(1, cell)
    box = torch.where(contested, owners.box.gather(1, cell), box)
    value = torch.where(contested, owners.alignment.gather(1, cell), value) * mask
    predicted, true = boxes_at(boxes_xyxy, cell), boxes_at(targets.boxes_xyxy, box)
    overlap = ciou(predicted, true).clamp_(min=0) * mask
    most_aligned, most_overlap = (v.new_zeros(len(v), n).scatter_reduce_(1, box, v, "amax") for v in (value, overlap))  # (B, n)
    score = value * (most_overlap / (most_aligned + 1e-9)).gather(1, box)
    return Assignment(cell, box, score, mask)
