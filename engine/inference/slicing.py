"""Sliced inference (arXiv 2202.06934): the windows that a large image is looked at through, and one list of objects out of all looks.

A look is one window, or the whole image. A box is *cut* where it touches a border of its window that is no border of the image: what it
shows may go on there. Two looks at the same object are recognised by what both could see:

* whole and whole: the boxes agree (IoU);
* cut and whole: most of the cut box lies in the whole one (intersection over the cut box);
* cut and cut: the boxes agree in the part of the image that both windows show. Then each has a piece, and the object is their union;
* any two: most of the smaller box lies in the other (intersection over the smaller, IoS), and the scores are not comparable.

Save for pieces, the better look stays, where a cut box counts for half of its score. Intersection over the smaller alone, as the paper
merges, would drop every small object in front of a large one of its class. Boxes of one look do not compete: they have passed suppression
together.
All of it is done on pairs of overlapping boxes at once; which of them stay is the fixed point that greedy suppression also ends in
(Cluster-NMS, arXiv 2005.03572).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from utils.boxes import box_area
from utils.types import Detections

SAME = 0.5  # agreement above which two looks show the same object, unless suppression is stricter
COMPARABLE = 0.5  # ratio of scores: a cut box loses against whole ones down to it, and pieces are joined down to it
BORDER = 0.01  # of a window's side: boxes that end so close to its border touch it
MAX_CANDIDATES = 30000  # best scores of an image that are merged
ROWS = 512  # boxes that are compared with others at once


class Seen(NamedTuple):
    """Boxes of one image from several looks, in px of the image."""

    boxes: Tensor  # (n, 4) xyxy
    scores: Tensor  # (n,)
    classes: Tensor  # (n,) int64
    windows: Tensor  # (n, 4) xyxy, what each was seen through
    look: Tensor  # (n,) int64, number of the look

    def take(self, rows: Tensor) -> Seen:
        """Some of them, by a mask or by index."""
        return Seen(*(column[rows] for column in self))


def slice_windows(hw: tuple[int, int], size_hw: tuple[int, int], overlap: float) -> Tensor:
    """Windows of one size that cover an image exactly, spread evenly, the outer ones flush with its borders.

    Args:
        hw: Height and width of the image in px.
        size_hw: Of a window; where the image is smaller, the window is too.
        overlap: Least common part of neighbours, as a fraction of the window's side.

    Returns:
        (n, 4) int64 xyxy px, row by row.
    """
    tops, lefts = (_starts(length, size, overlap) for length, size in zip(hw, size_hw))
    top, left = torch.meshgrid(tops, lefts, indexing="ij")
    corner = torch.stack((left, top), dim=-1).reshape(-1, 2)
    return torch.cat((corner, corner + torch.tensor((min(size_hw[1], hw[1]), min(size_hw[0], hw[0])))), dim=1)


def merge_looks(seen: Seen, hw: tuple[int, int], *, iou: float, max_det: int, agnostic: bool = False) -> Detections:
    """One box for each object out of what all looks have found.

    Args:
        seen: Boxes that have passed suppression within their look.
        hw: Height and width of the image in px.
        iou: Overlap that suppression used; where it is below one half, boxes of different looks are one object from there on too.
        max_det: The most boxes that are returned.
        agnostic: Boxes compete across classes.
    """
    if len(seen.scores) > MAX_CANDIDATES:
        seen = seen.take(seen.scores.topk(MAX_CANDIDATES).indices)
    same = min(iou, SAME)
    seen = _best_looks(seen, hw, same, agnostic=agnostic, pieces_compete=False)
    seen = _join_pieces(seen, hw, agnostic=agnostic)
    seen = _best_looks(seen, hw, same, agnostic=agnostic, pieces_compete=True)
    order = seen.scores.argsort(descending=True, stable=True)[:max_det]
    return Detections(seen.boxes[order], seen.scores[order], seen.classes[order])


def _starts(length: int, size: int, overlap: float) -> Tensor:
    """First px of each window along one side."""
    if length <= size:
        return torch.zeros(1, dtype=torch.long)
    step = max(size - math.ceil(size * overlap - 1e-6), 1)
    last = -(-(length - size) // step)
    return torch.arange(last + 1) * (length - size) // last


def _best_looks(seen: Seen, hw: tuple[int, int], same: float, *, agnostic: bool, pieces_compete: bool) -> Seen:
    """Without the boxes that a better look at the same object has beaten."""
    cut = _cut_sides(seen, hw).any(dim=1)
    order = (seen.scores * torch.where(cut, COMPARABLE, 1.0)).argsort(descending=True, stable=True)
    seen, cut = seen.take(order), cut[order]
    better, worse = _pairs(seen.boxes, seen, agnostic=agnostic)
    common, area = box_area(_common(seen.boxes[better], seen.boxes[worse])), box_area(seen.boxes)
    agreement = common / (area[better] + area[worse] - common).clamp(min=1e-7)
    inside = common / torch.minimum(area[better], area[worse]).clamp(min=1e-7)
    beats = torch.where(cut[worse], common / area[worse].clamp(min=1e-7), agreement) > same
    beats |= (inside > same) & (seen.scores[worse] < COMPARABLE * seen.scores[better])
    if not pieces_compete:
        beats &= ~(cut[better] & cut[worse])
    return seen.take(_greedy(better[beats], worse[beats], len(order)))


def _join_pieces(seen: Seen, hw: tuple[int, int], *, agnostic: bool) -> Seen:
    """With the pieces of an object that windows have cut as one box; what is joined may be a piece of something longer."""
    while True:
        seen = seen.take(seen.scores.argsort(descending=True, stable=True))
        sides = _cut_sides(seen, hw)
        margin = _margin(seen.windows)
        outwards = margin * margin.new_tensor((-1, -1, 1, 1))
        reach = torch.where(sides, seen.windows + outwards, seen.boxes)  # so that pieces of windows that only touch overlap too
        better, worse = _pairs(reach, seen, agnostic=agnostic)
        both = sides.any(dim=1)[better] & sides.any(dim=1)[worse] & (seen.scores[worse] >= COMPARABLE * seen.scores[better])
        better, worse = better[both], worse[both]
        view = _common((seen.windows + outwards)[better], (seen.windows + outwards)[worse])
        first, second = _common(reach[better], view), _common(reach[worse], view)
        common = box_area(_common(first, second))
        agree = common > SAME * (box_area(first) + box_area(second) - common)
        if not agree.any():
            return seen
        seen = _unite(seen, better[agree], worse[agree])


def _unite(seen: Seen, better: Tensor, worse: Tensor) -> Seen:
    """Every box that a better one has won becomes part of the best of those; of each look only the best piece makes it larger."""
    count = len(seen.scores)
    kept = _greedy(better, worse, count)
    pairs = kept[better]
    owner = torch.arange(count).scatter_reduce(0, worse[pairs], better[pairs], "amin")
    _, piece = torch.stack((owner, seen.look)).unique(dim=1, return_inverse=True)  # owner and look
    first = torch.full((count,), count).scatter_reduce(0, piece, torch.arange(count), "amin")
    adds = first[piece] == torch.arange(count)
    index = owner[adds][:, None].expand(-1, 2)
    low, high = (_reduced(seen, adds, index, columns, how) for columns, how in ((slice(0, 2), "amin"), (slice(2, 4), "amax")))
    boxes, windows = (torch.cat(corners, dim=1) for corners in zip(low, high))
    grown = torch.zeros(count, dtype=torch.bool).index_fill(0, owner[~kept], True)
    look = torch.where(grown, seen.look.max() + 1 + torch.arange(count), seen.look)  # one of its own: what has grown competes with all
    return Seen(boxes, seen.scores, seen.classes, windows, look).take(kept)


def _reduced(seen: Seen, adds: Tensor, index: Tensor, columns: slice, how: str) -> tuple[Tensor, Tensor]:
    """Corners of boxes and windows, the outermost of all that belong together."""
    boxes, windows = (
        corners[:, columns].scatter_reduce(0, index, corners[adds][:, columns], how) for corners in (seen.boxes, seen.windows)
    )
    return boxes, windows


def _cut_sides(seen: Seen, hw: tuple[int, int]) -> Tensor:
    """Which of the four sides (n, 4) touch a border of their window that is none of the image."""
    image = seen.windows.new_tensor((0, 0, hw[1], hw[0]))
    return ((seen.boxes - seen.windows).abs() <= _margin(seen.windows)) & (seen.windows != image)


def _margin(windows: Tensor) -> Tensor:
    """How close to each of its four sides a box touches a window's border, (n, 4) px."""
    return ((windows[:, 2:] - windows[:, :2]) * BORDER).clamp(min=1).repeat(1, 2)


def _common(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """What two boxes (n, 4) have in common, pair by pair; corners the wrong way round where that is nothing."""
    low = torch.maximum(boxes1_xyxy[:, :2], boxes2_xyxy[:, :2])
    return torch.cat((low, torch.minimum(boxes1_xyxy[:, 2:], boxes2_xyxy[:, 2:])), dim=1)


def _pairs(boxes_xyxy: Tensor, seen: Seen, *, agnostic: bool) -> tuple[Tensor, Tensor]:
    """Lower and higher index of every pair of boxes that overlap, are of one class and from different looks.

    Boxes are sorted by their left side, classes one after the other, so that each is only compared with those that begin before it ends.
    """
    extent = boxes_xyxy.max() - boxes_xyxy.min() + 1 if len(boxes_xyxy) else boxes_xyxy.new_tensor(0.0)
    shift = torch.zeros_like(seen.classes) if agnostic else seen.classes
    left, right = ((boxes_xyxy[:, side].double() + shift * extent.double()) for side in (0, 2))
    left, order = left.sort()
    right, top, bottom, look = right[order], boxes_xyxy[order, 1], boxes_xyxy[order, 3], seen.look[order]
    found = [torch.zeros(2, 0, dtype=torch.long)]
    for start in range(0, len(order), ROWS):
        rows = slice(start, start + ROWS)
        end = int(torch.searchsorted(left, right[rows].max()))
        others = slice(start, max(end, start))
        meet = (left[others] < right[rows, None]) & (left[rows, None] < right[others])
        meet &= (top[others] < bottom[rows, None]) & (top[rows, None] < bottom[others]) & (look[others] != look[rows, None])
        found.append(meet.triu(diagonal=1).nonzero().T + start)
    pairs = order[torch.cat(found, dim=1)]
    return pairs.amin(dim=0), pairs.amax(dim=0)


def _greedy(better: Tensor, worse: Tensor, count: int) -> Tensor:
    """Which of ``count`` boxes, best first, stay (mask) if of each pair the second falls wherever the first stays."""
    kept = torch.ones(count, dtype=torch.bool)
    while True:
        beaten = torch.zeros(count, dtype=torch.bool).index_fill(0, worse[kept[better]], True)
        if torch.equal(kept, ~beaten):
            return kept
        kept = ~beaten
