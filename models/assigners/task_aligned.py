"""Task-aligned assignment: a box is assigned to the cells inside it whose predicted class and box fit it best.

TOOD: Task-aligned One-stage Object Detection, arXiv 2108.07755. Alignment of a cell with a box is t = s^α · u^β (equation 3), s the score
of the box's class and u the overlap (CIoU) of the predicted box with it. Each box gets its ``topk`` best cells; a cell picked by
several boxes is assigned to the one that it overlaps most. The soft target of a cell is its t, scaled so that the best of a box's cells
gets the box's largest overlap (section 3.2).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.assigners.grid import LevelGrid, level_grid
from models.assigners.targets import PaddedTargets, boxes_at, can_count_without_wait
from utils.iou import ciou

CACHED_PAIRS = 1 << 17  # pairs that a CPU processes at once where their number is known
MAX_PAIRS = 1 << 23  # pairs of boxes and cells processed at once: bounds the memory for any batch
INSIDE_EPS = 1e-9  # px that a cell's centre is inside a box at least


class Assignment(NamedTuple):
    """The assignment as R = n · topk picks per image, valid where ``mask`` is true; no cell is valid twice.

    Boxes with fewer cells and images with fewer boxes are padded with masked picks.
    """

    cell: Tensor  # (B, R) int64, index of the cell over all levels
    box: Tensor  # (B, R) int64, index of the image's box
    score: Tensor  # (B, R) target score for the box's class in 0-1, 0 where masked
    mask: Tensor  # (B, R) bool


class _Pairs(NamedTuple):
    """The P candidate pairs of a box and a cell of one level."""

    row: Tensor  # (P,) box, counted over the images
    cell: Tensor  # (P,) cell within the level
    inside: Tensor | None  # (P,) whether the pair counts: the cell's centre is inside the box; None: all count


class TaskAlignedAssigner:
    """Assigns boxes to cells.

    Args:
        topk: cells a box.
        kept: cells a box after those that several boxes picked are resolved, the best aligned ones; None keeps all.
        alpha: exponent of the class score.
        beta: exponent of the overlap.
        min_candidate_side: px; a box with a shorter side has its candidates in an area enlarged to this length about its centre.
        owners_contain: whether a cell picked by several boxes is assigned to the one it overlaps most among those that contain it (YOLOv8),
            or among all boxes of the image (YOLOv9).
    """

    def __init__(
        self,
        *,
        topk: int = 10,
        alpha: float = 0.5,
        beta: float = 6.0,
        min_candidate_side: float = 0.0,
        owners_contain: bool = True,
        kept: int | None = None,
    ) -> None:
        self.topk, self.kept, self.alpha, self.beta = topk, kept, alpha, beta
        self.min_candidate_side, self.owners_contain = min_candidate_side, owners_contain

    def replace(self, *, topk: int, kept: int | None) -> TaskAlignedAssigner:
        """The same assigner with other numbers of cells a box."""
        other = copy.copy(self)
        other.topk, other.kept = topk, kept
        return other

    @torch.no_grad()
    def __call__(
        self,
        boxes_xyxy: Tensor,
        class_logits: Sequence[Tensor],
        strides: Sequence[float],
        targets: PaddedTargets,
        *,
        most_candidates: int | None = None,
    ) -> Assignment:
        """Assigns the targets of a whole batch; as in the published losses, a box centred on the image's top left corner is ignored.

        Args:
            boxes_xyxy: (B, N, 4) px, predicted; levels in order, cells row by row.
            class_logits: one (B, nc, H, W) a level.
            strides: px a cell of each level.
            targets: n boxes an image.
            most_candidates: from :meth:`most_candidates`, so that the candidates on a GPU can be listed without asking it for their
                number; without it all boxes are compared with all cells there.
        """
        (batch, n), cells = targets.valid.shape, boxes_xyxy.shape[1]
        if n == 0:
            none = boxes_xyxy.new_zeros(batch, 0)
            return Assignment(none.long(), none.long(), none, none.bool())
        targets = targets._replace(valid=targets.valid & (targets.boxes_xyxy.sum(dim=-1) > 0))
        logits = torch.cat([level.flatten(2) for level in class_logits], dim=2)
        view = _View(boxes_xyxy, logits, level_grid(class_logits, strides), most_candidates)
        topk, step = min(self.topk, cells), max(1, MAX_PAIRS // max(1, batch * cells))
        parts = [PaddedTargets(*(t[:, i : i + step] for t in targets)) for i in range(0, n, step)]
        picks = [self._alignment(view, part).topk(topk, dim=-1) for part in parts]
        value, cell = (torch.cat(p, dim=1).flatten(1) for p in zip(*picks))  # (B, n * topk)
        box = torch.arange(n, device=cell.device).repeat_interleave(topk).expand_as(cell)
        return self._resolve(box, cell, value, view, targets)

    def _alignment(self, view: _View, targets: PaddedTargets) -> Tensor:
        """Alignment (B, n, N) of boxes and cells, 0 where the cell is not inside the box."""
        (batch, n), cells = targets.valid.shape, view.boxes_xyxy.shape[1]
        boxes, labels = targets.boxes_xyxy.reshape(-1, 4), targets.labels.reshape(-1)
        pairs = self._candidates(targets, view)
        image = torch.div(pairs.row, n, rounding_mode="floor")
        predicted = view.boxes_xyxy.reshape(-1, 4)[image * cells + pairs.cell]
        score = view.logits.reshape(-1)[(image * view.logits.shape[1] + labels[pairs.row]) * cells + pairs.cell]
        value = self._measure(ciou(predicted, boxes[pairs.row]).clamp_(min=0), score)
        place = pairs.row * cells + pairs.cell
        if pairs.inside is not None:  # what does not count is written behind the end
            place = torch.where(pairs.inside, place, batch * n * cells)
        return value.new_zeros(batch * n * cells + 1).scatter_(0, place, value)[:-1].view(batch, n, cells)

    def _measure(self, overlap: Tensor, class_logit: Tensor) -> Tensor:
        return class_logit.float().sigmoid().pow_(self.alpha) * overlap.pow(self.beta)

    def _candidates(self, targets: PaddedTargets, view: _View) -> _Pairs:
        """The cells whose centres are inside the boxes.

        On a GPU, where counting them would synchronise, the list is as long as their bound, or holds all cells with all boxes.
        """
        low, high = self._area(targets.boxes_xyxy.reshape(-1, 4))  # (rows, 2)
        valid = targets.valid.reshape(-1)
        if can_count_without_wait(low):
            return pairs_inside(low, high, valid, view.grid)
        return all_pairs(low, high, valid, view.grid) if view.most is None else pairs_inside(low, high, valid, view.grid, length=view.most)

    def most_candidates(self, host_boxes_xyxy: Tensor, maps: Sequence[Tensor], strides: Sequence[float]) -> int:
        """A bound of the number of candidates of boxes (M, 4) px on the host, rounded up.

        Few numbers occur then, and there is room for a cell that the device rounds into a box.
        """
        low, high = self._area(host_boxes_xyxy)
        _, across, down = _spans(low, high, level_grid(maps, strides, device=low.device))
        return _rounded_up(int((across * down).sum()))

    def _area(self, boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
        """Corners (..., 2) px between which a cell's centre is a candidate for boxes (..., 4)."""
        low, high = boxes_xyxy.split(2, dim=-1)
        missing = (self.min_candidate_side - (high - low)).clamp(min=0) / 2
        return low - missing + INSIDE_EPS, high + missing - INSIDE_EPS

    def _resolve(self, box: Tensor, cell: Tensor, value: Tensor, view: _View, targets: PaddedTargets) -> Assignment:
        """Resolves cells that several boxes picked, and converts alignments into target scores.

        Args:
            box: (B, R) picking box.
            cell: (B, R) picked cell.
            value: (B, R) their alignment; 0 for an invalid pick.
            view: predictions.
            targets: n boxes an image.
        """
        n, cells = targets.valid.shape[1], view.boxes_xyxy.shape[1]
        picked = value > 0
        first = box.new_full((len(box), cells), n).scatter_reduce_(1, cell, torch.where(picked, box, n), "amin")  # (B, N)
        last = torch.full_like(first, -1).scatter_reduce_(1, cell, torch.where(picked, box, -1), "amax")
        mask = picked & (box == first.gather(1, cell))  # each picked cell once
        box = self._owner(box, cell, mask & (first < last).gather(1, cell), view, targets)

        overlap = ciou(boxes_at(view.boxes_xyxy, cell), boxes_at(targets.boxes_xyxy, box)).clamp_(min=0) * mask
        value = self._measure(overlap, view.logit_at(cell, targets.labels.gather(1, box)))
        if self.kept is not None:
            mask = mask & (_ranks(box, value.masked_fill(~mask, -1)) < self.kept)
            overlap, value = overlap * mask, value * mask
        most_aligned, most_overlap = (v.new_zeros(len(v), n).scatter_reduce_(1, box, v, "amax") for v in (value, overlap))  # (B, n)
        score = value * (most_overlap / (most_aligned + 1e-9)).gather(1, box)
        return Assignment(cell, box, score, mask)

    def _owner(self, box: Tensor, cell: Tensor, contested: Tensor, view: _View, targets: PaddedTargets) -> Tensor:
        """The picks' boxes (B, R), those of contested cells replaced by the box that the cell's prediction overlaps most.

        As with the candidates, the contested cells are listed on a CPU only.
        """
        free = can_count_without_wait(box)
        rows = contested.flatten().nonzero().squeeze(1) if free else torch.arange(box.numel(), device=box.device)
        image, at, best = torch.div(rows, box.shape[1], rounding_mode="floor"), cell.flatten()[rows], []
        step = max(1, (CACHED_PAIRS if free else MAX_PAIRS) // targets.valid.shape[1])
        low, high = (corner.permute(2, 0, 1).contiguous() for corner in self._area(targets.boxes_xyxy))  # (2, B, n)
        sides, centres = targets.boxes_xyxy.permute(2, 0, 1).contiguous(), view.grid.centres.T
        for i in range(0, len(rows), step):
            of, here = image[i : i + step], at[i : i + step]
            overlap = ciou(view.boxes_xyxy[of, here][:, None], sides[:, of].movedim(0, -1)) * targets.valid[of]  # (Q, n)
            if self.owners_contain:
                for axis in range(2):
                    centre = centres[here, axis, None]
                    overlap = overlap * ((centre > low[axis, of]) & (centre < high[axis, of]))
            best.append(overlap.clamp_(min=0).argmax(dim=1))
        owner = box.flatten().index_copy(0, rows, torch.cat([rows[:0], *best])).view_as(box)
        return torch.where(contested, owner, box)


class _View(NamedTuple):
    """The network's predictions."""

    boxes_xyxy: Tensor  # (B, N, 4) px
    logits: Tensor  # (B, nc, N) of the classes
    grid: LevelGrid
    most: int | None  # a bound of the number of candidates

    def logit_at(self, cell: Tensor, label: Tensor) -> Tensor:
        """Class logits (B, R) of cells (B, R) for labels (B, R)."""
        return self.logits.flatten(1).gather(1, label * self.logits.shape[2] + cell).float()


def pairs_inside(low: Tensor, high: Tensor, valid: Tensor, grid: LevelGrid, *, length: int | None = None) -> _Pairs:
    """Pairs of a box and a cell inside it, level by level, box by box, cells row by row.

    Args:
        low: (rows, 2) px, left top corners.
        high: (rows, 2) px, right bottom corners.
        valid: (rows,) bool, which rows are boxes.
        grid: the cells.
        length: P, at least the number of pairs; the list is filled up with pairs that do not count. None counts the pairs, for which the
            host waits for the device.
    """
    start, across, down = _spans(low, high, grid)  # (2, L, rows), (L, rows), (L, rows)
    across = across * valid
    count = (across * down).flatten()
    end = count.cumsum(0)
    begin = end - count
    if length is None:
        span = torch.repeat_interleave(torch.arange(len(count), device=low.device), count)
        order, inside = torch.arange(len(span), device=low.device) - begin[span], None
    else:
        order = torch.arange(length, device=low.device)
        span = torch.searchsorted(end, order, right=True).clamp_(max=len(count) - 1)
        inside = order < end[-1:]
        order = (order - begin[span]) * inside
    width = across.flatten()[span].clamp(min=1)
    step = torch.div(order, width, rounding_mode="floor")
    level = torch.div(span, len(low), rounding_mode="floor")
    column, line = (axis.flatten()[span] for axis in start)
    cell = grid.first[level] + (line + step) * grid.columns[level] + column + order - step * width
    return _Pairs(span - level * len(low), cell if inside is None else cell * inside, inside)


def all_pairs(low: Tensor, high: Tensor, valid: Tensor, grid: LevelGrid) -> _Pairs:
    """All boxes with all cells, and whether they are inside; arguments as for :func:`pairs_inside`."""
    x, y = grid.centres
    across, down = ((axis > low[:, i, None]) & (axis < high[:, i, None]) for i, axis in enumerate((x, y)))
    inside = across & down & valid[:, None]  # (rows, N)
    row = torch.arange(len(low), device=low.device).repeat_interleave(len(x))
    return _Pairs(row, torch.arange(len(x), device=low.device).repeat(len(low)), inside.flatten())


def _ranks(box: Tensor, value: Tensor) -> Tensor:
    """The rank (B, R) of each pick among those of its box (B, R), 0 for the one of the largest value; the first of equal ones leads."""
    order = value.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, box.gather(1, order).argsort(dim=1, stable=True))  # by box, then by value
    sorted_box = box.gather(1, order)
    place = torch.arange(box.shape[1], device=box.device).expand_as(box)
    return torch.empty_like(box).scatter_(1, order, place - torch.searchsorted(sorted_box, sorted_box))


def _spans(low: Tensor, high: Tensor, grid: LevelGrid) -> tuple[Tensor, Tensor, Tensor]:
    """First column and row (2, L, rows) of the cells inside boxes, and the numbers of columns and of rows (L, rows)."""
    start, stop = (
        torch.searchsorted(grid.axes, corner.T[:, None].expand(-1, grid.axes.shape[1], -1).contiguous(), right=right)
        for corner, right in ((low, True), (high, False))
    )
    across, down = (stop - start).clamp_(min=0)
    return start, across, down


def _rounded_up(count: int) -> int:
    """A number between 1.01 and 1.27 of ``count``, of which there are at most eight between two powers of two."""
    count += count // 64 + 64
    step = 1 << max(count.bit_length() - 4, 0)
    return -(-count // step) * step
