"""Task-aligned assignment: a box is assigned to the cells inside it whose predicted class and box fit it best.

TOOD: Task-aligned One-stage Object Detection, arXiv 2108.07755. Alignment of a cell with a box is t = s^α · u^β (equation 3), s the score
of the box's class and u the overlap (CIoU) of the predicted box with it. Each box gets its ``topk`` best cells; a cell picked by
several boxes is assigned to the one that it overlaps most. The soft target of a cell is its t, scaled so that the best of a box's cells
gets the box's largest overlap (section 3.2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from models.assigners.grid import LevelGrid, level_grid
from models.assigners.targets import PaddedTargets, can_count_without_wait
from utils.iou import ciou_of_terms, ciou_terms

CACHED_PAIRS = 1 << 17  # pairs that a CPU processes at once where their number is known
MAX_PAIRS = 1 << 23  # pairs of boxes and cells processed at once: bounds the memory for any batch
MAX_ALIGNMENTS = 1 << 25  # alignments of boxes with all cells, from listed pairs, that are ranked at once; 4 bytes each
INSIDE_EPS = 1e-9  # px that a cell's centre is inside a box at least


class Assignment(NamedTuple):
    """The assignment as R = n · topk picks per image, valid where ``mask`` is true; no cell is valid twice.

    Boxes with fewer cells and images with fewer boxes are padded with masked picks. Images are those of all branches, branch by branch.
    """

    cell: Tensor  # (B, R) int64, index of the cell over all levels
    box: Tensor  # (B, R) int64, index of the image's box
    score: Tensor  # (B, R) target score for the box's class in 0-1, 0 where masked
    mask: Tensor  # (B, R) bool
    row: Tensor  # (B, R) int64, ``Predicted.row`` of the cells


class OverlapMeasure(Protocol):
    """Replaces the overlap of predicted boxes with boxes by another measure in 0-1."""

    def __call__(self, overlap: Tensor, *, place: Tensor, number: Tensor) -> Tensor:
        """The measure of pairs, of the shape of ``overlap``.

        Args:
            overlap: CIoU, at least 0.
            place: int64, the prediction of each pair, counted over branches, images and cells; its shape can be broadcast to ``overlap``'s.
            number: int64, the box of each pair, counted over images and the n places of each; the same.
        """


@runtime_checkable
class RankedMeasure(OverlapMeasure, Protocol):
    """A measure that is computed only for the candidates of each box that the overlap of boxes ranks best.

    Attributes:
        best: how many, as a multiple of the cells a box.
    """

    best: int

    def measure(self, place: Tensor, number: Tensor, valid: Tensor) -> None:
        """Computes the measure of pairs (P,), of which those that are ``valid`` (P,) count; later calls are looked up among them."""


class Predicted(NamedTuple):
    """The network's predictions: of K branches, which are assigned the same boxes, each with B images of N cells."""

    terms: Tensor  # (8, K, B · N) of the boxes, image by image, see :func:`utils.iou.ciou_terms`
    logits: Tensor  # (K · B · N, nc) of the classes, branch by branch, in any order within a branch
    row: Tensor  # (K · B · N,) int64, in which row the logits of each image's cells are
    grid: LevelGrid
    most: int | None = None  # from :meth:`TaskAlignedAssigner.most_candidates`
    measure: OverlapMeasure | None = None  # in place of the overlap of boxes

    def measured(self, overlap: Tensor, place: Tensor, number: Tensor) -> Tensor:
        """The overlap in effect, see :class:`OverlapMeasure`."""
        overlap = overlap.clamp_(min=0)
        return overlap if self.measure is None else self.measure(overlap, place=place, number=number)


class _Truth(NamedTuple):
    """The boxes of B images, n each."""

    labels: Tensor  # (B, n)
    terms: Tensor  # (8, B, n)
    area: Tensor  # (4, B, n) px: −left, −top, right, bottom of the area that holds the centres of candidates
    valid: Tensor  # (B, n) bool
    number: Tensor  # (B, n) int64, counted over the images


class _Pairs(NamedTuple):
    """The P candidate pairs of a box and a cell inside it."""

    row: Tensor  # (P,) box, counted over the images
    cell: Tensor  # (P,) cell over all levels
    inside: Tensor | None  # (P,) whether the pair counts; None: all count


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

    def __call__(
        self,
        boxes_xyxy: Tensor,
        class_logits: Sequence[Tensor],
        strides: Sequence[float],
        targets: PaddedTargets,
        *,
        most_candidates: int | None = None,
    ) -> Assignment:
        """Assigns the targets of a whole batch to the predictions of one branch.

        Args:
            boxes_xyxy: (B, N, 4) px, predicted; levels in order, cells row by row.
            class_logits: one (B, nc, H, W) a level.
            strides: px a cell of each level.
            targets: n boxes an image.
            most_candidates: see :meth:`most_candidates`.
        """
        logits = torch.cat([level.flatten(2) for level in class_logits], dim=2).transpose(1, 2).flatten(0, 1)  # (B · N, nc)
        row = torch.arange(len(logits), device=logits.device)
        terms = ciou_terms(boxes_xyxy.flatten(0, 1))[:, None]
        return self.assign(Predicted(terms, logits, row, level_grid(class_logits, strides), most_candidates), targets)

    @torch.no_grad()
    def assign(self, predicted: Predicted, targets: PaddedTargets) -> Assignment:
        """Assigns the targets of a batch to all branches.

        As in the published losses, a box centred on the image's top left corner is ignored.
        Candidates are listed where their number is known: on a CPU, and with a bound of it. Without one, and in a compiled graph, all
        boxes are compared with all cells.
        """
        (batch, n), cells = targets.valid.shape, predicted.grid.centres.shape[1]
        branches = predicted.terms.shape[1]
        if n == 0:
            none = predicted.terms.new_zeros(branches * batch, 0)
            return Assignment(none.long(), none.long(), none, none.bool(), none.long())
        terms = ciou_terms(targets.boxes_xyxy)
        valid = targets.valid & (terms[4:6].sum(dim=0) > 0)
        number = torch.arange(batch * n, device=valid.device).view(batch, n)
        truth = _Truth(targets.labels, terms, self.area(terms), valid, number)
        topk = min(self.topk, cells)
        if isinstance(predicted.measure, RankedMeasure):
            self._measure_best(predicted.measure, predicted, truth)
        value, cell = self._best(predicted, truth, topk)  # (K, B, n, topk)
        box = torch.arange(n, device=cell.device)[:, None].expand(branches * batch, -1, topk).flatten(1)
        return self._resolve(box, cell.reshape(branches * batch, -1), value.reshape(branches * batch, -1), predicted, truth)

    def _measure_best(self, measure: RankedMeasure, predicted: Predicted, truth: _Truth) -> None:
        """Has the measure computed for the candidates that align best by the overlap of boxes."""
        cells = predicted.grid.centres.shape[1]
        least = torch.finfo(torch.float32).tiny  # candidates whose boxes do not overlap count, behind all others
        value, cell = self._best(predicted._replace(measure=None), truth, min(measure.best * self.topk, cells), least=least)
        number = truth.number[..., None].expand_as(cell)
        sheet = torch.arange(len(cell) * cell.shape[1], device=cell.device).view(*cell.shape[:2], 1, 1)
        measure.measure((sheet * cells + cell).flatten(), number.flatten(), (value > 0).flatten())

    def _best(self, predicted: Predicted, truth: _Truth, count: int, *, least: float = 0.0) -> tuple[Tensor, Tensor]:
        """The largest alignments (K, B, n, count) of each box, at least ``least`` where the cell is inside it, and their cells."""
        (batch, n), branches, cells = truth.valid.shape, predicted.terms.shape[1], predicted.grid.centres.shape[1]
        counted = can_count_without_wait(truth.valid)
        if not counted and predicted.most is not None:
            blocks = self._listed_alignments(predicted, truth, predicted.most, least=least)
            value, cell = _joined([block.topk(count, dim=-1) for block in blocks], dim=0)
            return value.view(branches, batch, n, count), cell.view(branches, batch, n, count)
        step = max(1, MAX_PAIRS // max(1, branches * batch * cells))
        parts = (_Truth(*(t[..., i : i + step] for t in truth)) for i in range(0, n, step))
        aligned = self._counted_alignment if counted else self._dense_alignment
        return _joined([aligned(predicted, part, least=least).topk(count, dim=-1) for part in parts], dim=2)

    def _listed_alignments(self, predicted: Predicted, truth: _Truth, most: int, *, least: float) -> Iterator[Tensor]:
        """Alignments (rows, N) of all K · B · n rows of boxes with all cells in turn, 0 where the cell is not inside the box.

        The at most ``most`` pairs are listed once: each block of rows takes its own of them.
        """
        branches, cells = predicted.terms.shape[1], predicted.grid.centres.shape[1]
        area, valid, found = truth.area.flatten(1), truth.valid.reshape(-1), []
        rows, branch = branches * len(valid), torch.arange(branches, device=valid.device)[:, None] * len(valid)
        step = max(1, MAX_PAIRS // branches)
        for first in range(0, most, step):
            pairs = pairs_inside(area, valid, predicted.grid, length=min(step, most - first), first=first)
            assert pairs.inside is not None
            place = (branch + pairs.row).mul_(cells).add_(pairs.cell)  # (K, P)
            found.append((torch.where(pairs.inside, place, -1), self._pair_alignment(predicted, truth, pairs, least=least)))
        place, value = (t.flatten() for t in _joined(found, dim=1))
        step = max(1, MAX_ALIGNMENTS // cells)
        for first in range(0, rows, step):
            size = min(step, rows - first) * cells
            own = (place - (first * cells - 1)).clamp_(0, size + 1)  # what is of other blocks is written before and behind this one
            yield value.new_zeros(size + 2).scatter_(0, own, value)[1:-1].view(-1, cells)

    def _counted_alignment(self, predicted: Predicted, truth: _Truth, *, least: float) -> Tensor:
        """Alignment (K, B, n, N) of boxes and cells, 0 where the cell is not inside the box, from pairs that the host counts."""
        (batch, n), branches, cells = truth.valid.shape, predicted.terms.shape[1], predicted.grid.centres.shape[1]
        pairs = pairs_inside(truth.area.flatten(1), truth.valid.reshape(-1), predicted.grid)
        value = self._pair_alignment(predicted, truth, pairs, least=least)
        place = pairs.row.mul(cells).add_(pairs.cell).expand_as(value)
        return value.new_zeros(branches, batch * n * cells).scatter_(1, place, value).view(branches, batch, n, cells)

    def _pair_alignment(self, predicted: Predicted, truth: _Truth, pairs: _Pairs, *, least: float) -> Tensor:
        """Alignment (K, P) of listed pairs, at least ``least``."""
        n, branches, cells = truth.valid.shape[1], predicted.terms.shape[1], predicted.grid.centres.shape[1]
        at = torch.div(pairs.row, n, rounding_mode="floor").mul_(cells).add_(pairs.cell)  # over the images
        overlap = ciou_of_terms(predicted.terms.index_select(2, at), truth.terms.flatten(1).index_select(1, pairs.row)[:, None])
        if predicted.measure is not None:
            overlap = predicted.measured(overlap, _of_branches(at, predicted), truth.number.flatten()[pairs.row])
        logit = predicted.row[at].mul_(predicted.logits.shape[1]).add_(truth.labels.reshape(-1)[pairs.row])
        value = self._measure(overlap.clamp_(min=0), predicted.logits.reshape(branches, -1).index_select(1, logit))
        return value.clamp_(min=least) if least else value

    def _dense_alignment(self, predicted: Predicted, truth: _Truth, *, least: float) -> Tensor:
        """The same, from all pairs, at least ``least`` where the cell is inside the box."""
        batch, cells = len(truth.valid), predicted.grid.centres.shape[1]
        centres = torch.cat((-predicted.grid.centres, predicted.grid.centres))[:, None, None]  # (4, 1, 1, N)
        inside = (centres < truth.area[..., None]).all(dim=0) & truth.valid[..., None]  # (B, n, N)
        overlap = ciou_of_terms(predicted.terms.unflatten(2, (batch, 1, cells)), truth.terms[:, None, ..., None])  # (K, B, n, N)
        if predicted.measure is not None:
            place = torch.arange(predicted.row.numel(), device=overlap.device).view(-1, batch, 1, cells)
            overlap = predicted.measured(overlap, place, truth.number[..., None])
        logits = predicted.logits[predicted.row.view(-1, batch, 1, cells), truth.labels[..., None]]
        return self._measure(overlap.clamp(min=0), logits).clamp(min=least) * inside

    def _measure(self, overlap: Tensor, class_logit: Tensor) -> Tensor:
        return class_logit.float().sigmoid().pow(self.alpha) * overlap.pow(self.beta)

    def most_candidates(self, host_boxes_xyxy: Tensor, maps: Sequence[Tensor], strides: Sequence[float]) -> int:
        """A bound of the number of candidates of boxes (M, 4) px on the host, rounded up, with which a GPU can list them.

        Few numbers occur then, and there is room for a cell that the device rounds into a box.
        """
        area = self.area(ciou_terms(host_boxes_xyxy))
        _, counts = spans_inside(area, level_grid(maps, strides, device=area.device))
        return _rounded_up(int(counts.prod(dim=0).sum()))

    def area(self, terms: Tensor) -> Tensor:
        """−left, −top, right, bottom (4, ...) px of the areas in which the centres of candidates are, of boxes' terms (8, ...)."""
        sides = terms[:4]
        if self.min_candidate_side > 0:
            low, high = sides.split(2)
            missing = (self.min_candidate_side - (low + high)).clamp_(min=0) / 2
            sides = sides + torch.cat((missing, missing))
        return sides - INSIDE_EPS

    def _resolve(self, box: Tensor, cell: Tensor, value: Tensor, predicted: Predicted, truth: _Truth) -> Assignment:
        """Resolves cells that several boxes picked, and converts alignments into target scores.

        Args:
            box: (K · B, R) picking box.
            cell: (K · B, R) picked cell.
            value: (K · B, R) their alignment; 0 for an invalid pick.
            predicted: the predictions.
            truth: n boxes an image.
        """
        (n, cells), branches = (truth.valid.shape[1], predicted.grid.centres.shape[1]), predicted.terms.shape[1]
        picked = value > 0
        ends = torch.where(picked[:, None], torch.stack((box, -box), dim=1), n)  # (K · B, 2, R)
        at = cell[:, None].expand_as(ends)
        least = ends.new_full((len(box), 2, cells), n).scatter_reduce_(2, at, ends, "amin")
        first, last = least.gather(2, at).unbind(1)  # the cell's first box, and minus its last
        mask = picked & (box == first)  # each picked cell once
        place = torch.arange(0, len(box) * cells, cells, device=box.device)[:, None] + cell
        terms = predicted.terms.flatten(1).index_select(1, place.flatten()).unflatten(1, box.shape)  # (8, K · B, R)
        resolve = self._listed_owners if can_count_without_wait(box) else self._owners
        picks = _Picks(terms, predicted.grid.centres[:, cell], place[None], predicted)
        box, overlap = resolve(box, mask & (first + last < 0), picks, truth)
        row, overlap, label = predicted.row[place], overlap * mask, truth.labels.repeat(branches, 1).gather(1, box)
        value = self._measure(overlap, predicted.logits.reshape(-1)[row * predicted.logits.shape[1] + label])
        if self.kept is not None:
            mask = mask & (_ranks(box, value.masked_fill(~mask, -1)) < self.kept)
            overlap, value = overlap * mask, value * mask
        most = torch.stack((value, overlap))
        most = most.new_zeros(2, len(box), n).scatter_reduce_(2, box.expand_as(most), most, "amax")  # (2, K · B, n)
        score = value * (most[1] / (most[0] + 1e-9)).gather(1, box)
        return Assignment(cell, box, score, mask, row)

    def _owners(self, box: Tensor, contested: Tensor, picks: _Picks, truth: _Truth) -> tuple[Tensor, Tensor]:
        """The picks' boxes (K · B, R), those of contested cells replaced by the box that the cell's prediction overlaps most, and the
        overlaps; from all picks with all boxes."""
        (batch, n), found = truth.valid.shape, []
        truth = _Truth(*(t.unsqueeze(-2).unsqueeze(-4) for t in truth))  # (…, 1, B, 1, n)
        picks = picks.map(lambda t: t.unflatten(1, (-1, batch)).unsqueeze(-1))  # (…, K, B, R, 1)
        step = max(1, MAX_PAIRS // (len(box) * n))
        for i in range(0, box.shape[1], step):
            overlap = self._overlap(picks.at((..., slice(i, i + step), slice(None))), truth).flatten(0, 1)  # (K · B, r, n)
            own = torch.where(contested[:, i : i + step], overlap.argmax(dim=2), box[:, i : i + step])
            found.append((own, overlap.gather(2, own[..., None]).squeeze(2)))
        owner, most = (torch.cat(t, dim=1) if len(t) > 1 else t[0] for t in zip(*found))
        return owner, most

    def _listed_owners(self, box: Tensor, contested: Tensor, picks: _Picks, truth: _Truth) -> tuple[Tensor, Tensor]:
        """The same, where the contested cells can be counted, from these alone."""
        (batch, n), rows = truth.valid.shape, contested.flatten().nonzero().squeeze(1)
        image, best = torch.div(rows, box.shape[1], rounding_mode="floor") % batch, [rows[:0]]
        flat = picks.map(lambda t: t.flatten(1))
        for here, of in zip(*(t.split(max(1, CACHED_PAIRS // n)) for t in (rows, image))):
            best.append(self._overlap(flat.at((slice(None), here, None)), _Truth(*(t[..., of, :] for t in truth))).argmax(dim=1))  # (Q, n)
        owner = box.flatten().index_copy(0, rows, torch.cat(best)).view_as(box)
        own = torch.arange(0, len(box) * n, n, device=box.device)[:, None] % (batch * n) + owner
        terms = truth.terms.flatten(1).index_select(1, own.flatten()).unflatten(1, own.shape)
        return owner, picks.predicted.measured(ciou_of_terms(picks.terms, terms), picks.place[0], truth.number.flatten()[own])

    def _overlap(self, picks: _Picks, truth: _Truth) -> Tensor:
        """Overlaps of picks with the boxes that may own them, 0 for others; the trailing shapes broadcast."""
        may = truth.valid
        if self.owners_contain:
            may = may & (torch.cat((-picks.centres, picks.centres)) < truth.area).all(dim=0)
        return picks.predicted.measured(ciou_of_terms(picks.terms, truth.terms), picks.place[0], truth.number) * may


class _Picks(NamedTuple):
    """The picked cells of all images."""

    terms: Tensor  # (8, K · B, R) of the predicted boxes
    centres: Tensor  # (2, K · B, R) px of the cells
    place: Tensor  # (1, K · B, R) int64, the predictions, counted over branches, images and cells
    predicted: Predicted

    def map(self, function: Callable[[Tensor], Tensor]) -> _Picks:
        """The same with ``function`` of the tensors."""
        return _Picks(function(self.terms), function(self.centres), function(self.place), self.predicted)

    def at(self, index: Any) -> _Picks:
        """The same with an index of the tensors."""
        return self.map(lambda t: t[index])


def _joined(parts: Sequence[Sequence[Tensor]], *, dim: int) -> tuple[Tensor, Tensor]:
    """Both tensors of the parts, joined along ``dim``."""
    first, second = (torch.cat(t, dim=dim) if len(t) > 1 else t[0] for t in zip(*parts))
    return first, second


def _of_branches(place: Tensor, predicted: Predicted) -> Tensor:
    """Places (P,) over the images of one branch as places (K, P) over all branches."""
    per_branch = predicted.row.numel() // predicted.terms.shape[1]
    return torch.arange(0, predicted.row.numel(), per_branch, device=place.device)[:, None] + place


def pairs_inside(area: Tensor, valid: Tensor, grid: LevelGrid, *, length: int | None = None, first: int = 0) -> _Pairs:
    """Pairs of a box and a cell inside it, level by level, box by box, cells row by row.

    Args:
        area: (4, rows) px: −left, −top, right, bottom.
        valid: (rows,) bool, which rows are boxes.
        grid: the cells.
        length: P; a list longer than the number of pairs is filled up with pairs that do not count. None counts the pairs, for which
            the host waits for the device.
        first: number of the list's first pair among all pairs.
    """
    start, counts = spans_inside(area, grid)  # (2, L, rows)
    across = counts[0] * valid
    count = (across * counts[1]).flatten()
    end = count.cumsum(0)
    if length is None:
        span = torch.repeat_interleave(torch.arange(len(count), device=area.device), count)
        order, inside = torch.arange(len(span), device=area.device), None
    else:
        order = torch.arange(first, first + length, device=area.device)
        span = torch.searchsorted(end, order, right=True).clamp_(max=len(count) - 1)
        inside = order < end[-1:]
    columns = grid.sizes[0]  # (L, 1)
    corner = torch.addcmul(grid.first + start[0], start[1], columns)
    facts = torch.stack((end - count, across.flatten().clamp(min=1), corner.flatten(), (columns - across).flatten()))
    before, width, first_cell, skipped = facts.index_select(1, span)
    order = order - before
    cell = torch.addcmul(first_cell.add_(order), torch.div(order, width, rounding_mode="floor"), skipped)
    return _Pairs(span % area.shape[1], cell if inside is None else cell * inside, inside)


def _ranks(box: Tensor, value: Tensor) -> Tensor:
    """The rank (B, R) of each pick among those of its box (B, R), 0 for the one of the largest value; the first of equal ones leads."""
    order = value.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, box.gather(1, order).argsort(dim=1, stable=True))  # by box, then by value
    sorted_box = box.gather(1, order)
    place = torch.arange(box.shape[1], device=box.device).expand_as(box)
    return torch.empty_like(box).scatter_(1, order, place - torch.searchsorted(sorted_box, sorted_box))


def spans_inside(area: Tensor, grid: LevelGrid) -> tuple[Tensor, Tensor]:
    """First column and row (2, L, rows) of the cells whose centres are inside areas (4, rows), and the numbers of columns and rows."""
    query = -area[:, None].expand(-1, grid.axes.shape[1], -1).contiguous()
    outside = torch.searchsorted(grid.axes, query, right=True)  # (4, L, rows) on each side
    return outside[:2], (grid.sizes - outside[:2] - outside[2:]).clamp_(min=0)


def _rounded_up(count: int) -> int:
    """A number between 1.01 and 1.27 of ``count``, of which there are at most eight between two powers of two."""
    count += count // 64 + 64
    step = 1 << max(count.bit_length() - 4, 0)
    return -(-count // step) * step
