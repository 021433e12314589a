"""Which detection found which object: the matching rules behind average precision, for a whole data set at once.

Everything is arrays over all images. Only pairs of one image and one class that overlap by at least 0.5 matter; they are few, and the
greedy rule runs over them in rounds: round r matches the r-th best detection of every (image, class) group side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
IOU_THRESHOLDS: Array = np.linspace(0.5, 0.95, 10)
AREA_RANGES: Array = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # px²: all, small, medium, large (COCO)
PAIRS_AT_ONCE = 4_000_000


class Objects(NamedTuple):
    """Boxes of a data set, detections or ground truth, one row each."""

    image: NDArray[np.int64]  # (n,) index of the image
    label: NDArray[np.int64]  # (n,) class
    boxes_ltwh: Array  # (n, 4) px of the original image
    score: Array  # (n,) of a detection; ones for ground truth
    area: Array  # (n,) px²
    crowd: NDArray[np.bool_]  # (n,) whether a box stands for a crowd, which may be found many times and never has to be
    fields: Mapping[str, NDArray] = MappingProxyType({})  # (n, …) what a task adds, by name

    def take(self, rows: NDArray) -> Objects:
        """Some of them, by a mask or by index."""
        image, label, boxes, score, area, crowd = (column[rows] for column in self[:6])
        return Objects(image, label, boxes, score, area, crowd, {name: column[rows] for name, column in self.fields.items()})


class Pairs(NamedTuple):
    """Pairs of a detection and an object that overlap, ordered by detection, then object."""

    det: NDArray[np.int64]  # (p,)
    truth: NDArray[np.int64]  # (p,)
    iou: Array  # (p,)


Similarity = Callable[[Objects, Objects, NDArray, NDArray], Array]  # (dets, truth, rows of dets (p,), rows of truth (p,)) -> (p,) in 0-1


class Match(NamedTuple):
    """What became of each detection at T thresholds (and A ranges of area)."""

    correct: NDArray[np.bool_]  # (n, T, A)
    ignored: NDArray[np.bool_]  # (n, T, A) neither right nor wrong


def box_overlap(dets: Objects, truth: Objects, d: NDArray, g: NDArray) -> Array:
    """Intersection over union of pairs of boxes (over the detection's area for crowds), (p,).

    In float64 and in the order of operations of pycocotools, so that borderline cases agree.
    """
    (dx, dy, dw, dh), (gx, gy, gw, gh) = dets.boxes_ltwh[d].T, truth.boxes_ltwh[g].T
    width = np.minimum(dx + dw, gx + gw) - np.maximum(dx, gx)
    height = np.minimum(dy + dh, gy + gh) - np.maximum(dy, gy)
    meet = np.flatnonzero((width > 0) & (height > 0))
    common = width[meet] * height[meet]
    det_area = dw[meet] * dh[meet]
    union = np.where(truth.crowd[g[meet]], det_area, det_area + gw[meet] * gh[meet] - common)
    overlap = np.zeros(len(d))
    overlap[meet] = common / union
    return overlap


def match_coco(
    dets: Objects,
    truth: Objects,
    *,
    thresholds: Array = IOU_THRESHOLDS,
    areas: Array = AREA_RANGES,
    similarity: Similarity = box_overlap,
) -> Match:
    """COCO's greedy rule, as pycocotools applies it.

    Detections choose in order of score; each takes the free object of its class that it overlaps most (the later one of equals), a counted
    one before an ignored one. Crowds and objects outside the range of area are ignored, and so is whoever matches them; unmatched
    detections outside the range are ignored as well.

    Args:
        dets: Detections, sorted by score inside each group of one image and class.
        truth: Ground truth.
        thresholds: (T,) the least overlap, each 0.5 or more.
        areas: (A, 2) px², both ends included.
        similarity: How alike a detection and an object are.
    """
    pairs = overlapping_pairs(dets, truth, at_least=float(thresholds.min()), similarity=similarity)
    ignored_truth = _outside(truth.area, areas) | truth.crowd[:, None]  # (m, A)
    matched, ignored = _match_rounds(pairs, _rounds(pairs, dets), truth.crowd, ignored_truth, thresholds=thresholds, dets=len(dets.image))
    outside = _outside(dets.area, areas)[:, None]  # (n, 1, A)
    return Match(correct=matched & ~ignored, ignored=np.where(matched, ignored, outside))


def match_yolov5(dets: Objects, truth: Objects, *, thresholds: Array = IOU_THRESHOLDS, similarity: Similarity = box_overlap) -> Match:
    """YOLOv5's rule: every detection points at the object that it overlaps most; of those that point at one object the best scored wins.

    A detection whose favourite is taken gets no second choice, and there are neither crowds nor ranges of area.

    Args:
        dets: Detections, sorted by score inside each image.
        truth: Ground truth.
        thresholds: (T,) the least overlap.
        similarity: How alike a detection and an object are.
    """
    pairs = overlapping_pairs(dets, truth, at_least=float(thresholds.min()), similarity=similarity)
    order = np.lexsort((-pairs.iou, pairs.det))
    favourite = order[np.unique(pairs.det[order], return_index=True)[1]]  # best pair of every detection, in order of detection
    correct = np.zeros((len(dets.image), len(thresholds), 1), dtype=bool)
    for t, threshold in enumerate(thresholds):
        valid = favourite[pairs.iou[favourite] >= threshold]
        first = np.unique(pairs.truth[valid], return_index=True)[1]
        correct[pairs.det[valid[first]], t] = True
    return Match(correct, np.zeros_like(correct))


def overlapping_pairs(
    dets: Objects, truth: Objects, *, at_least: float, across_classes: bool = False, similarity: Similarity = box_overlap
) -> Pairs:
    """All pairs of one image (and one class) that are alike enough."""
    parts = []
    for d, g in _pairs_in_chunks(dets, truth, across_classes=across_classes):
        overlap = similarity(dets, truth, d, g)
        near = overlap >= at_least
        parts.append(Pairs(d[near], g[near], overlap[near]))
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return Pairs(none, none, np.zeros(0))
    return Pairs(*(np.concatenate(column) for column in zip(*parts)))


def _pairs_in_chunks(dets: Objects, truth: Objects, *, across_classes: bool) -> Iterator[tuple[NDArray, NDArray]]:
    """Row numbers of every (detection, object) that share a group, some million at a time."""
    if not len(dets.image) or not len(truth.image):
        return
    classes = 1 if across_classes else int(max(dets.label.max(), truth.label.max())) + 1
    det_key, truth_key = (o.image * classes + (0 if across_classes else o.label) for o in (dets, truth))
    by_key = np.argsort(truth_key, kind="stable")
    first = np.searchsorted(truth_key[by_key], det_key, side="left")
    count = np.searchsorted(truth_key[by_key], det_key, side="right") - first
    rows = np.flatnonzero(count)
    total = np.cumsum(count[rows])
    start = 0
    while start < len(rows):
        done = total[start - 1] if start else 0
        stop = max(int(np.searchsorted(total, done + PAIRS_AT_ONCE, side="right")), start + 1)
        chunk = rows[start:stop]
        sizes = count[chunk]
        offset = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        yield np.repeat(chunk, sizes), by_key[np.repeat(first[chunk], sizes) + offset]
        start = stop


def _outside(area: Array, areas: Array) -> NDArray[np.bool_]:
    return (area[:, None] < areas[:, 0]) | (area[:, None] > areas[:, 1])  # (n, A)


def _rounds(pairs: Pairs, dets: Objects) -> NDArray[np.int64]:
    """The round of every pair: the rank of its detection among those of its group that have a pair at all."""
    if not len(pairs.det):
        return pairs.det
    rows, inverse = np.unique(pairs.det, return_inverse=True)
    key = dets.image[rows] * (int(dets.label.max()) + 1) + dets.label[rows]
    return rank_in_group(key)[inverse]


def rank_in_group(key: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2 … for the rows of each key in their order."""
    order = np.argsort(key, kind="stable")
    starts = np.r_[True, np.diff(key[order]) != 0][: len(key)]
    positions = np.arange(len(key))
    rank = np.empty_like(key)
    rank[order] = positions - np.maximum.accumulate(np.where(starts, positions, 0))
    return rank


def _match_rounds(
    pairs: Pairs, rounds: NDArray, crowd: NDArray, ignored_truth: NDArray, *, thresholds: Array, dets: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether each detection has a match, and whether that match is an ignored object: two arrays (n, T, A)."""
    shape = (len(thresholds), ignored_truth.shape[1])
    taken = np.zeros((len(crowd), *shape), dtype=bool)
    matched, ignored = np.zeros((2, dets, *shape), dtype=bool)
    order = np.lexsort((pairs.truth, pairs.det, rounds))
    bounds = np.searchsorted(rounds[order], np.arange(int(rounds.max(initial=-1)) + 2))
    for start, stop in itertools.pairwise(bounds.tolist()):
        det, truth, iou = (column[order[start:stop]] for column in pairs)
        firsts = np.flatnonzero(np.r_[True, np.diff(det) != 0])
        free = (iou[:, None] >= thresholds)[:, :, None] & (~taken[truth] | crowd[truth, None, None])  # (p, T, A)
        # a counted object keeps its IoU of 0.5 to 1; an ignored one gets IoU - 1, exact and below every counted one; -2 is none
        value = np.where(ignored_truth[truth][:, None], iou[:, None, None] - 1, iou[:, None, None])
        value = np.where(free, value, -2.0)
        best = np.maximum.reduceat(value, firsts, axis=0)  # (d, T, A)
        sizes = np.diff(np.r_[firsts, len(det)])
        is_best = (value == np.repeat(best, sizes, axis=0)) & free
        choice = np.maximum.reduceat(np.where(is_best, np.arange(len(det))[:, None, None], -1), firsts, axis=0)
        row, t, a = np.nonzero(choice >= 0)
        chosen = truth[choice[row, t, a]]
        found = det[firsts[row]]
        taken[chosen, t, a] = True
        matched[found, t, a] = True
        ignored[found, t, a] = ignored_truth[chosen, a]
    return matched, ignored
