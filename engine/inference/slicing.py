"""Sliced inference (arXiv 2202.06934): the windows of a large image, and one list of objects out of what all windows found.

A view is one window, or the whole image. A box is *cut* where it touches a border of its window that is no border of the image: the object
may continue there. Two boxes of different views are recognised as one object by what both views could see:

* whole and whole: the boxes agree (IoU);
* cut and whole: most of the cut box lies in the whole one (intersection over the cut box);
* cut and cut: the boxes agree in the part of the image that both windows show. Then each has a piece, and the object is their union;
* any two: most of the smaller box lies in the other (intersection over the smaller, IoS), and the scores are not comparable.

Except for pieces, the better box stays, where a cut box counts for half of its score. Intersection over the smaller alone, as the paper
merges, would drop every small object in front of a large one of its class. Boxes of one view do not compete: they have passed suppression
together. All of it is done on pairs of overlapping boxes at once; which of them stay is the fixed point that greedy suppression also ends
in (Cluster-NMS, arXiv 2005.03572).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks import DETECT, Task
from utils.boxes import box_area
from utils.types import Detections

SAME = 0.5  # agreement above which two views show the same object, unless suppression is stricter
COMPARABLE = 0.5  # ratio of scores: a cut box loses against whole ones down to it, and pieces are joined down to it
BORDER = 0.01  # of a window's side: boxes that end so close to its border touch it
MAX_CANDIDATES = 30000  # best scores of an image that are merged
ROWS = 512  # boxes that are compared with others at once


@dataclass(frozen=True)
class WindowDetections:
    """Detections of one image through several windows (or as a whole), in px of the image."""

    detections: Detections
    windows: Tensor  # (n, 4) xyxy, the window that each was found in
    view: Tensor  # (n,) int64, number of the window; 0 for the whole image

    def __len__(self) -> int:
        return len(self.view)

    @property
    def boxes(self) -> Tensor:
        """(n, 4) xyxy"""
        return self.detections.boxes

    @property
    def scores(self) -> Tensor:
        """(n,)"""
        return self.detections.scores

    @property
    def classes(self) -> Tensor:
        """(n,) int64"""
        return self.detections.classes

    def __getitem__(self, index: Any) -> WindowDetections:
        """Some of them, by a mask or by index."""
        return WindowDetections(self.detections[index], self.windows[index], self.view[index])

    @classmethod
    def cat(cls, parts: Sequence[WindowDetections]) -> WindowDetections:
        """Those of several windows together."""
        return WindowDetections(
            Detections.cat([p.detections for p in parts]), torch.cat([p.windows for p in parts]), torch.cat([p.view for p in parts])
        )


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


def merge_windows(
    found: WindowDetections, hw: tuple[int, int], *, iou: float, max_det: int, agnostic: bool = False, task: Task = DETECT
) -> Detections:
    """One box for each object out of what all views have found.

    Args:
        found: Boxes that have passed suppression within their view.
        hw: Height and width of the image in px.
        iou: Overlap that suppression used; where it is below one half, boxes of different views are one object from there on too.
        max_det: The most boxes that are returned.
        agnostic: Boxes compete across classes.
        task: What the detections are: what they cover, and what joined pieces have beside boxes.
    """
    if len(found.scores) > MAX_CANDIDATES:
        found = found[found.scores.topk(MAX_CANDIDATES).indices]
    same = min(iou, SAME)
    if task.shapes(found.detections).can_grow:
        found = _drop_beaten(found, hw, same, task, agnostic=agnostic, pieces_compete=False)
        found = _join_pieces(found, hw, agnostic=agnostic, task=task)
    found = _drop_beaten(found, hw, same, task, agnostic=agnostic, pieces_compete=True)
    order = found.scores.argsort(descending=True, stable=True)[:max_det]
    return found.detections[order]


def _starts(length: int, size: int, overlap: float) -> Tensor:
    """First px of each window along one side."""
    if length <= size:
        return torch.zeros(1, dtype=torch.long)
    step = max(size - math.ceil(size * overlap - 1e-6), 1)
    last = -(-(length - size) // step)
    return torch.arange(last + 1) * (length - size) // last


def _drop_beaten(
    found: WindowDetections, hw: tuple[int, int], same: float, task: Task, *, agnostic: bool, pieces_compete: bool
) -> WindowDetections:
    """Without the boxes that lose against a better box of the same object."""
    cut = _cut_sides(task.shapes(found.detections).extents, found.windows, hw).any(dim=1)
    order = (found.scores * torch.where(cut, COMPARABLE, 1.0)).argsort(descending=True, stable=True)
    found, cut = found[order], cut[order]
    covered = task.shapes(found.detections)
    better, worse = _pairs(covered.extents, found, agnostic=agnostic)
    common, area = covered.common(better, worse), covered.area
    agreement = common / (area[better] + area[worse] - common).clamp(min=1e-7)
    inside = common / torch.minimum(area[better], area[worse]).clamp(min=1e-7)
    beats = torch.where(cut[worse], common / area[worse].clamp(min=1e-7), agreement) > same
    beats |= (inside > same) & (found.scores[worse] < COMPARABLE * found.scores[better])
    if not pieces_compete:
        beats &= ~(cut[better] & cut[worse])
    return found[_greedy(better[beats], worse[beats], len(order))]


def _join_pieces(found: WindowDetections, hw: tuple[int, int], *, agnostic: bool, task: Task) -> WindowDetections:
    """With the pieces of an object that windows have cut as one box; what is joined may be a piece of something longer."""
    while True:
        found = found[found.scores.argsort(descending=True, stable=True)]
        sides = _cut_sides(found.boxes, found.windows, hw)
        margin = _margin(found.windows)
        outwards = margin * margin.new_tensor((-1, -1, 1, 1))
        reach = torch.where(sides, found.windows + outwards, found.boxes)  # so that pieces of windows that only touch overlap too
        better, worse = _pairs(reach, found, agnostic=agnostic)
        both = sides.any(dim=1)[better] & sides.any(dim=1)[worse] & (found.scores[worse] >= COMPARABLE * found.scores[better])
        better, worse = better[both], worse[both]
        view = _common((found.windows + outwards)[better], (found.windows + outwards)[worse])
        first, second = _common(reach[better], view), _common(reach[worse], view)
        common = box_area(_common(first, second))
        agree = common > SAME * (box_area(first) + box_area(second) - common)
        if not agree.any():
            return found
        found = _unite(found, better[agree], worse[agree], task)


def _unite(found: WindowDetections, better: Tensor, worse: Tensor, task: Task) -> WindowDetections:
    """Every box that a better one has won becomes part of the best of those; of each view only the best piece makes it larger."""
    count = len(found.scores)
    kept = _greedy(better, worse, count)
    pairs = kept[better]
    owner = torch.arange(count).scatter_reduce(0, worse[pairs], better[pairs], "amin")
    _, piece = torch.stack((owner, found.view)).unique(dim=1, return_inverse=True)  # owner and view
    first = torch.full((count,), count).scatter_reduce(0, piece, torch.arange(count), "amin")
    adds = first[piece] == torch.arange(count)
    index = owner[adds][:, None].expand(-1, 2)
    low, high = (_reduced(found, adds, index, columns, how) for columns, how in ((slice(0, 2), "amin"), (slice(2, 4), "amax")))
    boxes, windows = (torch.cat(corners, dim=1) for corners in zip(low, high))
    grown = torch.zeros(count, dtype=torch.bool).index_fill(0, owner[~kept], True)
    view = torch.where(grown, found.view.max() + 1 + torch.arange(count), found.view)  # one of its own: what has grown competes with all
    added = adds & ~kept
    detections = task.unite(found.detections.replace(boxes=boxes), owner[added], added.nonzero()[:, 0])
    return WindowDetections(detections, windows, view)[kept]


def _reduced(found: WindowDetections, adds: Tensor, index: Tensor, columns: slice, how: str) -> tuple[Tensor, Tensor]:
    """Corners of boxes and windows, the outermost of all that belong together."""
    boxes, windows = (
        corners[:, columns].scatter_reduce(0, index, corners[adds][:, columns], how) for corners in (found.boxes, found.windows)
    )
    return boxes, windows


def _cut_sides(boxes_xyxy: Tensor, windows: Tensor, hw: tuple[int, int]) -> Tensor:
    """Which of the four sides (n, 4) touch a border of their window that is none of the image, or lie beyond it."""
    image, outwards = windows.new_tensor((0, 0, hw[1], hw[0])), windows.new_tensor((-1, -1, 1, 1))
    return ((boxes_xyxy - windows) * outwards >= -_margin(windows)) & (windows != image)


def _margin(windows: Tensor) -> Tensor:
    """How close to each of its four sides a box touches a window's border, (n, 4) px."""
    return ((windows[:, 2:] - windows[:, :2]) * BORDER).clamp(min=1).repeat(1, 2)


def _common(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """What two boxes (n, 4) have in common, pair by pair; corners the wrong way round where that is nothing."""
    low = torch.maximum(boxes1_xyxy[:, :2], boxes2_xyxy[:, :2])
    return torch.cat((low, torch.minimum(boxes1_xyxy[:, 2:], boxes2_xyxy[:, 2:])), dim=1)


def _pairs(boxes_xyxy: Tensor, found: WindowDetections, *, agnostic: bool) -> tuple[Tensor, Tensor]:
    """Lower and higher index of every pair of boxes that overlap, are of one class and from different views.

    Boxes are sorted by their left side, classes one after the other, so that each is only compared with those that begin before it ends.
    """
    extent = boxes_xyxy.max() - boxes_xyxy.min() + 1 if len(boxes_xyxy) else boxes_xyxy.new_tensor(0.0)
    shift = torch.zeros_like(found.classes) if agnostic else found.classes
    left, right = ((boxes_xyxy[:, side].double() + shift * extent.double()) for side in (0, 2))
    left, order = left.sort()
    right, top, bottom, view = right[order], boxes_xyxy[order, 1], boxes_xyxy[order, 3], found.view[order]
    pieces = [torch.zeros(2, 0, dtype=torch.long)]
    for start in range(0, len(order), ROWS):
        rows = slice(start, start + ROWS)
        end = int(torch.searchsorted(left, right[rows].max()))
        others = slice(start, max(end, start))
        meet = (left[others] < right[rows, None]) & (left[rows, None] < right[others])
        meet &= (top[others] < bottom[rows, None]) & (top[rows, None] < bottom[others]) & (view[others] != view[rows, None])
        pieces.append(meet.triu(diagonal=1).nonzero().T + start)
    pairs = order[torch.cat(pieces, dim=1)]
    return pairs.amin(dim=0), pairs.amax(dim=0)


def _greedy(better: Tensor, worse: Tensor, count: int) -> Tensor:
    """Which of ``count`` boxes, best first, stay (mask) if of each pair the second falls wherever the first stays."""
    kept = torch.ones(count, dtype=torch.bool)
    while True:
        beaten = torch.zeros(count, dtype=torch.bool).index_fill(0, worse[kept[better]], True)
        if torch.equal(kept, ~beaten):
            return kept
        kept = ~beaten
