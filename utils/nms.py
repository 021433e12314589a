"""Non-maximum suppression: from everything a head decodes to the boxes that are kept, best score first.

Predictions with one candidate an object (``Predictions.unique``) are not suppressed: their best are kept.

A batch costs one selection on the device, one wait for its counts, and on a GPU one call of torchvision's suppression for as many images
as fit its matrix of pairs; on a CPU, where joined images would be compared with each other, one call per image. Nothing is dropped for
lack of time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from typing import NamedTuple

import torch
from torch import Tensor

from utils.types import Detections, Predictions

MOST_UNIQUE = 300  # detections of an image without suppression, as published (YOLOv10, YOLO26)
FIRST_CANDIDATES = 8  # candidates tried first, as a multiple of ``max_det``
LIBRARIES = ("_C_stable", "_C")  # of torchvision, with its operators; newest first
JOINED_CANDIDATES = 1 << 15  # most of one call on a GPU; its bits for all pairs then take 128 MiB


@dataclass(frozen=True)
class Suppression:
    """How suppression chooses.

    Attributes:
        conf: Only scores above this take part.
        iou: A box is dropped if it overlaps a better one of its class by more than this.
        max_det: The most detections of an image.
        classes: Only these classes are kept; None keeps all. With ``multi_label=False`` a box whose best class is another one is dropped.
        agnostic: Boxes compete across classes.
        multi_label: A box counts once for every class above ``conf`` (validation), not only for its best class.
        max_candidates: The most candidates (best scores) of an image that enter suppression.
    """

    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 300
    classes: Sequence[int] | None = None
    agnostic: bool = False
    multi_label: bool = False
    max_candidates: int = 30000


def non_max_suppression(predictions: Predictions, suppression: Suppression) -> list[Detections]:
    """Keeps the best of boxes that overlap; the fields of a candidate go with its box.

    Args:
        predictions: Boxes (B, N, 4) xyxy px and scores (B, N, C).
        suppression: How to choose.

    Returns:
        One ``Detections`` per image, in order.
    """
    if predictions.unique:
        return keep_best(predictions, suppression)
    images = select_candidates(predictions, suppression)
    if predictions.boxes.device.type == "cpu":
        return [_suppress(candidates, suppression) for candidates in images]
    return suppress_joined(images, suppression)


def select_candidates(predictions: Predictions, suppression: Suppression) -> list[Detections]:
    """What of each image's predictions takes part in suppression, best score first; waits for the device once."""
    boxes = predictions.boxes
    scores, labels = _candidate_scores(predictions.scores, suppression.classes, multi_label=suppression.multi_label)  # (B, N · C) or (B, N)
    above = scores > suppression.conf
    counts = above.sum(dim=1).clamp(max=suppression.max_candidates).tolist()  # the one wait for the device
    per_box = scores.shape[1] // max(boxes.shape[1], 1)
    scores, index = _best_first(scores.masked_fill(~above, float("-inf")), max(counts, default=0))  # (B, K)
    labels = labels.expand(above.shape).gather(1, index)
    anchor = (index // max(per_box, 1))[..., None]  # (B, K, 1)
    boxes = boxes.gather(1, anchor.expand(-1, -1, 4))  # (B, K, 4)
    fields = {name: value.gather(1, anchor.expand(-1, -1, value.shape[2])) for name, value in predictions.fields.items()}
    return [
        Detections(b[:n], s[:n], c[:n], {name: value[i, :n] for name, value in fields.items()})
        for i, (b, s, c, n) in enumerate(zip(boxes, scores, labels, counts))
    ]


def _best_first(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest of each row's scores (B, M) and their places, of equal ones the first first: topk alone leaves that open."""
    _, index = scores.topk(count, dim=1, sorted=False)
    index = index.sort(dim=1).values
    scores, order = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    return scores, index.gather(1, order)


def suppress_joined(images: Sequence[Detections], suppression: Suppression) -> list[Detections]:
    """Greedy suppression of the candidates of several images, best score first in each, with few calls and two waits for the device a call.

    Images and classes lie side by side, in float64: there shifted coordinates lose nothing.
    """
    first, found = FIRST_CANDIDATES * suppression.max_det, list(images)
    for members in _groups([min(len(candidates), first) for candidates in images]):
        prefixes = [images[i][:first] for i in members]
        for i, candidates, keep in zip(members, prefixes, _kept(prefixes, suppression)):
            complete = len(keep) >= suppression.max_det or len(images[i]) <= first
            found[i] = candidates[keep[: suppression.max_det]] if complete else _suppress(images[i], suppression)
    return found


def _groups(counts: Sequence[int]) -> list[list[int]]:
    """Numbers of consecutive images that together have at most ``JOINED_CANDIDATES``, or one image with more."""
    groups: list[list[int]] = []
    total = 0
    for index, count in enumerate(counts):
        if not groups or total + count > JOINED_CANDIDATES:
            groups.append([])
            total = 0
        groups[-1].append(index)
        total += count
    return groups


def _kept(images: Sequence[Detections], suppression: Suppression) -> list[Tensor]:
    """Which candidates of each image are kept, best first."""
    together = Detections.cat([candidates.replace(fields={}) for candidates in images])
    counts = [len(candidates) for candidates in images]
    device = together.scores.device
    if not len(together):
        return [torch.zeros(0, dtype=torch.long, device=device) for _ in images]
    starts = torch.tensor([0, *counts]).cumsum(0)
    image = torch.arange(len(images)).repeat_interleave(torch.tensor(counts)).to(device, non_blocking=True)  # (M,)
    spread = together.boxes.double()
    group = image if suppression.agnostic else image * (together.classes.max() + 1) + together.classes
    keep = nms(spread + (group * (spread.max() - spread.min() + 1))[:, None], together.scores.double(), suppression.iou)
    keep = keep[image[keep].argsort(stable=True)]  # image by image, best first
    kept = torch.bincount(image[keep], minlength=len(images)).tolist()
    return [rows - start for rows, start in zip(keep.split(kept), starts.tolist())]


class Selection(NamedTuple):
    """The best candidates of each image, best score first."""

    scores: Tensor  # (B, K)
    classes: Tensor  # (B, K) int64
    candidate: Tensor  # (B, K) int64, which of the N


def select_best(scores: Tensor, *, count: int, agnostic: bool = False) -> Selection:
    """The ``count`` candidates of the highest class score, then the ``count`` highest pairs of candidate and class among them.

    So that a candidate may count for several classes, unless ``agnostic``: then each counts for its best class. Fewer than ``count``
    where there are fewer candidates. Traceable, and waits for no device.

    Args:
        scores: (B, N, C).
        count: the most that are selected.
        agnostic: one class a candidate.
    """
    best, label = scores.max(dim=2)  # (B, N)
    best, candidate = best.topk(min(count, scores.shape[1]), dim=1)  # (B, K)
    if agnostic or scores.shape[2] == 1:
        return Selection(best, label.gather(1, candidate), candidate)
    pairs = scores.gather(1, candidate[..., None].expand(-1, -1, scores.shape[2])).flatten(1)  # (B, K · C)
    best, pair = pairs.topk(candidate.shape[1], dim=1)
    return Selection(best, pair % scores.shape[2], candidate.gather(1, torch.div(pair, scores.shape[2], rounding_mode="floor")))


def keep_best(predictions: Predictions, suppression: Suppression) -> list[Detections]:
    """The best candidates of each image with a score above ``conf``."""
    scores = predictions.scores
    if suppression.classes is not None:
        unwanted = [c for c in range(scores.shape[2]) if c not in set(suppression.classes)]
        scores = scores.index_fill(2, torch.tensor(unwanted, dtype=torch.long).to(scores.device, non_blocking=True), float("-inf"))
    found = select_best(scores, count=min(suppression.max_det, MOST_UNIQUE), agnostic=suppression.agnostic)
    at = found.candidate[..., None]
    boxes = predictions.boxes.gather(1, at.expand(-1, -1, 4))
    fields = {name: value.gather(1, at.expand(-1, -1, value.shape[2])) for name, value in predictions.fields.items()}
    counts = (found.scores > suppression.conf).sum(dim=1).tolist()  # the one wait for the device
    together = Detections(boxes, found.scores, found.classes, fields)
    return [together[image][:n] for image, n in enumerate(counts)]


def _candidate_scores(scores: Tensor, classes: Sequence[int] | None, *, multi_label: bool) -> tuple[Tensor, Tensor]:
    """Flat scores and the class of each; scores of unwanted classes become minus infinity."""
    batch, _, nc = scores.shape
    if not multi_label and nc > 1:
        values, labels = scores.max(dim=2)
    else:
        values = scores.flatten(1)
        labels = torch.arange(nc, device=scores.device).repeat(scores.shape[1])[None].expand(batch, -1)
    if classes is not None:
        unwanted = torch.tensor([c not in set(classes) for c in range(nc)]).to(scores.device, non_blocking=True)
        values = values.masked_fill(unwanted[labels], float("-inf"))
    return values, labels


def _suppress(candidates: Detections, suppression: Suppression) -> Detections:
    """Greedy suppression of one image's candidates, which come best score first.

    Whether a candidate is kept depends only on better ones, so the first ``max_det`` kept of a prefix are those of the whole: a prefix is
    tried first, and most images never need more.
    """
    spread = candidates.boxes.float()  # half precision overflows with the offsets
    if not suppression.agnostic and len(spread):
        extent = spread.max() - spread.min() + 1
        spread = spread + (candidates.classes * extent)[:, None]  # classes lie side by side and never meet
    scores = candidates.scores.float()
    first = FIRST_CANDIDATES * suppression.max_det
    keep = nms(spread[:first], scores[:first], suppression.iou)
    if len(keep) < suppression.max_det and len(spread) > first:
        keep = nms(spread, scores, suppression.iou)
    return candidates[keep[: suppression.max_det]]


def nms(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """``torchvision.ops.nms``; on a CPU without its package, whose import takes more than torch does. Not for compiled graphs.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,).
        iou: boxes that overlap a better one by more are dropped.

    Returns:
        Which boxes are kept, (K,) int64, best first.
    """
    if boxes.device.type != "cpu" or not _load_library():
        from torchvision.ops import nms as of_package  # checks that torch is of the same CUDA, and says what is wrong with it

        return of_package(boxes, scores, iou)
    kept: Tensor = torch.ops.torchvision.nms(boxes, scores, iou)
    return kept


@lru_cache(maxsize=1)
def _load_library() -> bool:
    """Registers torchvision's operators from its own library; whether it is there under a known name, and fits."""
    package = importlib.util.find_spec("torchvision")
    folders = (package.submodule_search_locations if package is not None else None) or ()
    for name in LIBRARIES:
        library = PathFinder.find_spec(name, list(folders))
        if library is None or library.origin is None:
            continue
        try:
            torch.ops.load_library(library.origin)
        except OSError:  # built for another torch
            return False
        if hasattr(torch.ops.torchvision, "nms"):
            return True
    return False
