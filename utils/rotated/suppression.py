"""Suppression of rotated boxes: all images and boxes of a block at once, by ProbIoU or by the overlap of the polygons.

Two rules decide. *Fast* (as published for the YOLO family): a box is dropped where any better box of its class overlaps it, also one that
was dropped itself. *Greedy*, as for axis-aligned boxes: only boxes that stay drop others; it is the fixed point of the rule "a box stays
where no better box that stays overlaps it" (Cluster-NMS, arXiv 2005.03572), which is reached after a few rounds over the whole block.

Boxes come best score first and are decided in blocks, so that memory is bounded, and no further block is looked at when every image has
its ``max_det``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.nms import Suppression, keep_best, select_candidates
from utils.rotated.boxes import rotated_boxes
from utils.rotated.overlap import rotated_iou
from utils.rotated.probiou import gaussian_terms, probiou_of_terms
from utils.types import Detections, Predictions

MAX_PAIRS = 1 << 22  # pairs of boxes compared at once: bounds memory
MAX_BLOCK = 1024  # boxes decided at once


class Measure(NamedTuple):
    """How much rotated boxes overlap."""

    prepared: Callable[[Tensor], Tensor]  # boxes (…, 5) to terms (k, …)
    overlap: Callable[[Tensor, Tensor], Tensor]  # of two sets of terms whose trailing shapes broadcast, (…)
    most_apart: float  # the most that boxes overlap whose surrounding circles are apart


# Circles of radii r and s touch at the distance r + s. A variance is at most r²/3, so that B ≥ 3/4 (r + s)² / (r² + s²) ≥ 3/4.
PROBIOU = Measure(gaussian_terms, probiou_of_terms, most_apart=0.28)
POLYGON = Measure(lambda boxes: boxes.movedim(-1, 0), lambda one, other: rotated_iou(one.movedim(0, -1), other.movedim(0, -1)), 0.0)


def rotated_suppression(predictions: Predictions, suppression: Suppression, *, greedy: bool = False) -> list[Detections]:
    """As :func:`utils.nms.non_max_suppression`, for predictions whose field ``angle`` (B, N, 1) turns their boxes."""
    if predictions.unique:
        return keep_best(predictions, suppression)
    return suppress_rotated(select_candidates(predictions, suppression), suppression, greedy=greedy)


def suppress_rotated(
    images: Sequence[Detections], suppression: Suppression, *, greedy: bool = False, measure: Measure = PROBIOU
) -> list[Detections]:
    """What stays of the candidates of several images, which come best score first.

    On a GPU the images are decided together; on a CPU, where padding would be computed, one after the other.
    """
    together = [list(images)] if images and images[0].scores.device.type != "cpu" else [[one] for one in images]
    found: list[Detections] = []
    for group in together:
        kept = _kept(group, suppression, greedy=greedy, measure=measure)
        found += [one[mask[: len(one)]][: suppression.max_det] for one, mask in zip(group, kept)]
    return found


def _kept(images: Sequence[Detections], suppression: Suppression, *, greedy: bool, measure: Measure) -> Tensor:
    """Which candidates (B, K) stay, as far as ``max_det`` asks for; images with fewer than K are padded."""
    counts = torch.tensor([len(one) for one in images])
    most = int(counts.max())
    first = images[0]
    boxes = first.boxes.new_zeros((len(images), most, 5), dtype=torch.float32)
    group = torch.full((len(images), most), -1, device=boxes.device)  # padding is of no class
    for place, labels, one in zip(boxes, group, images):
        place[: len(one)] = rotated_boxes(one.boxes, one.fields["angle"]).float()
        labels[: len(one)] = 0 if suppression.agnostic else one.classes
    terms, kept = measure.prepared(boxes), group >= 0
    step = max(1, min(MAX_BLOCK, MAX_PAIRS // max(len(images) * most, 1)))
    for start in range(0, most, step):
        stop = min(start + step, most)
        may = group[:, :stop, None] == group[:, None, start:stop]  # (B, better, block)
        may &= torch.arange(stop, device=boxes.device)[:, None] < torch.arange(start, stop, device=boxes.device)
        if boxes.device.type == "cpu" and suppression.iou >= measure.most_apart:
            may &= _near(boxes[:, :stop, None], boxes[:, None, start:stop])
            image, better, worse = may.nonzero(as_tuple=True)
            value = measure.overlap(terms[:, image, better], terms[:, image, start + worse])
            over = may.index_put((image, better, worse), value > suppression.iou)
        else:
            over = may & (measure.overlap(terms[:, :, :stop, None], terms[:, :, None, start:stop]) > suppression.iou)
        decide = _greedy if greedy else _fast
        kept[:, start:stop] &= decide(over, kept[:, :stop])
        if stop < most and bool((kept[:, :stop].sum(dim=1) >= suppression.max_det).all()):
            break
    return kept


def _near(one: Tensor, other: Tensor) -> Tensor:
    """Whether the circles around boxes (…, 5) whose leading shapes broadcast meet."""
    reach1, reach2 = (boxes[..., 2:4].norm(dim=-1) / 2 for boxes in (one, other))
    dx, dy = (one[..., axis] - other[..., axis] for axis in (0, 1))
    return dx * dx + dy * dy <= (reach1 + reach2) ** 2


def _fast(over: Tensor, kept: Tensor) -> Tensor:
    """Which of a block's boxes (B, block) no better box (B, better, block) overlaps; padding overlaps nothing of a class."""
    return ~over.any(dim=1)


def _greedy(over: Tensor, kept: Tensor) -> Tensor:
    """Which of a block's boxes (B, block) no better box that stays overlaps; ``kept`` (B, better) is decided up to the block."""
    start = over.shape[1] - over.shape[2]
    alive = kept[:, start:] & ~(over[:, :start] & kept[:, :start, None]).any(dim=1)
    inside, stay = over[:, start:], alive
    while True:
        after = alive & ~(inside & stay[..., None]).any(dim=1)
        if torch.equal(after, stay):
            return stay
        stay = after
