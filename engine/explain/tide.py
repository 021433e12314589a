"""The six kinds of errors of a detector and what each costs in AP.

TIDE: A General Toolbox for Identifying Object Detection Errors, arXiv 2008.08115, section 2. A prediction is right if it is matched to an
object of its class at IoU 0.5. Any other one is, by the first of these that holds, a ``location`` error (IoU from 0.1 to 0.5 with an object
of its class), a ``class`` error (at least 0.5 with one of another class), a ``duplicate`` (at least 0.5 with one of its class that a better
prediction has), an error of ``both`` (at least 0.1 with one of another class) or ``background``. ``missed`` are objects that no prediction
is right about and that no location or class error is about. A kind's cost is how much AP at IoU 0.5 rises when that kind alone is mended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from utils.metrics.average_precision import coco_average_precision

FOREGROUND, BACKGROUND = 0.5, 0.1
KINDS = ("class", "location", "both", "duplicate", "background", "missed")
RIGHT = "right"


@dataclass(frozen=True)
class ImageResult:
    """Detections and objects of one image, in px of it.

    Attributes:
        path: of the image.
        boxes: (n, 4) xyxy of the detections.
        scores: (n,).
        classes: (n,).
        true_boxes: (m, 4) xyxy of the objects.
        true_classes: (m,).
    """

    path: str
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    classes: NDArray[np.int64]
    true_boxes: NDArray[np.float64]
    true_classes: NDArray[np.int64]


@dataclass(frozen=True)
class Case:
    """One detection or object and what became of it.

    Attributes:
        image: number of the image.
        kind: one of ``KINDS``, or right.
        detection: number in the image, -1 for an object that was missed.
        object: number in the image of the object that it is about, -1 for none.
        score: of the detection; of a miss the best score that a detection with IoU of at least 0.1 has, or 0.
        iou: with that object.
    """

    image: int
    kind: str
    detection: int
    object: int
    score: float
    iou: float


@dataclass(frozen=True)
class ErrorReport:
    """Errors of a set of images.

    Attributes:
        cases: every detection and every miss.
        ap50: mean AP at IoU 0.5 over the classes that have objects, in 0-1.
        cost: kind -> rise of ``ap50`` when the kind is mended.
        counts: kind -> number of cases.
    """

    cases: Sequence[Case]
    ap50: float
    cost: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def of_kind(self, kind: str) -> list[Case]:
        """Its cases, the most confident first."""
        return sorted((case for case in self.cases if case.kind == kind), key=lambda case: -case.score)


def find_errors(images: Sequence[ImageResult], *, classes: int) -> ErrorReport:
    """The errors of detections on images, and what mending each kind would bring."""
    cases = [case for number, image in enumerate(images) for case in _cases_of(number, image)]
    base = _ap50(_records(images, cases, mended=None), classes)
    cost = {kind: _ap50(_records(images, cases, mended=kind), classes) - base for kind in KINDS}
    return ErrorReport(cases, base, cost, {kind: sum(case.kind == kind for case in cases) for kind in (RIGHT, *KINDS)})


def overlaps(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU (n, m) of boxes (n, 4) and (m, 4) xyxy."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(np.clip(b[:, 2:] - b[:, :2], 0, None), axis=1) for b in (boxes, others)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-12)


def _cases_of(number: int, image: ImageResult) -> Iterator[Case]:
    iou = overlaps(image.boxes, image.true_boxes)  # (n, m)
    owner = _matched(image, iou)
    usable = np.zeros(len(image.true_boxes), bool)  # objects that a class or location error could be turned into
    same = image.classes[:, None] == image.true_classes[None]
    for n, score in enumerate(image.scores):
        if owner[n] >= 0:
            yield Case(number, RIGHT, n, int(owner[n]), float(score), float(iou[n, owner[n]]))
            continue
        kind, which = _kind_of(iou[n], same[n])
        if kind in ("class", "location"):
            usable[which] = True
        yield Case(number, kind, n, which, float(score), float(iou[n, which]) if which >= 0 else 0.0)
    found = np.zeros(len(image.true_boxes), bool)
    found[owner[owner >= 0]] = True
    for m in np.flatnonzero(~found & ~usable):
        near = np.flatnonzero(iou[:, m] >= BACKGROUND)
        best = near[image.scores[near].argmax()] if len(near) else -1
        yield Case(number, "missed", -1, int(m), float(image.scores[best]) if best >= 0 else 0.0, float(iou[best, m]) if best >= 0 else 0.0)


def _matched(image: ImageResult, iou: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each detection the object of its class that it is right about, -1 for none: the best free one, better scores first."""
    owner = np.full(len(image.boxes), -1, np.int64)
    taken = np.zeros(len(image.true_boxes), bool)
    for n in np.argsort(-image.scores, kind="stable"):
        free = np.where(~taken & (image.true_classes == image.classes[n]), iou[n], -1.0)
        if len(free) and free.max() >= FOREGROUND:
            owner[n] = int(free.argmax())
            taken[owner[n]] = True
    return owner


def _kind_of(iou: NDArray[np.float64], same: NDArray[np.bool_]) -> tuple[str, int]:
    """Kind of a detection (its IoU with all objects (m,)) that is matched to none, and the object that it is about."""
    own, other = np.where(same, iou, -1.0), np.where(same, -1.0, iou)
    best_own, best_other = own.max(initial=-1.0), other.max(initial=-1.0)
    if BACKGROUND <= best_own < FOREGROUND:
        return "location", int(own.argmax())
    if best_other >= FOREGROUND:
        return "class", int(other.argmax())
    if best_own >= FOREGROUND:
        return "duplicate", int(own.argmax())
    if best_other >= BACKGROUND:
        return "both", int(other.argmax())
    return "background", -1


@dataclass(frozen=True)
class _Records:
    """What AP is computed from: class, score and rightness of detections, and the objects of each class."""

    classes: NDArray[np.int64]
    scores: NDArray[np.float64]
    right: NDArray[np.bool_]
    objects: NDArray[np.int64]


def _records(images: Sequence[ImageResult], cases: Sequence[Case], *, mended: str | None) -> _Records:
    """The detections of all images, one kind of error mended as TIDE mends it.

    ``class`` and ``location`` errors become right, unless their object is taken, in which case they go; ``both``, ``duplicate`` and
    ``background`` errors go; ``missed`` objects do not count.
    """
    taken = {(case.image, case.object) for case in cases if case.kind == RIGHT}
    rows: list[tuple[int, float, bool]] = []
    removed = np.zeros(0, np.int64)
    for case in sorted((c for c in cases if c.detection >= 0), key=lambda c: -c.score):
        image = images[case.image]
        label, right = int(image.classes[case.detection]), case.kind == RIGHT
        if case.kind == mended:
            place = (case.image, case.object)
            if mended not in ("class", "location") or place in taken:
                continue
            taken.add(place)
            label, right = int(image.true_classes[case.object]), True
        rows.append((label, case.score, right))
    if mended == "missed":
        removed = np.array([images[c.image].true_classes[c.object] for c in cases if c.kind == "missed"], np.int64)
    most = max((int(i.true_classes.max(initial=-1)) for i in images), default=-1) + 1
    objects = np.bincount(np.concatenate([np.zeros(0, np.int64), *(i.true_classes for i in images)]), minlength=most)
    objects = objects - np.bincount(removed, minlength=len(objects))
    labels, scores, rights = ([row[column] for row in rows] for column in range(3))
    return _Records(np.array(labels, np.int64), np.array(scores, np.float64), np.array(rights, bool), objects)


def _ap50(records: _Records, classes: int) -> float:
    """Mean over the classes that have objects; 0 where none has."""
    values = []
    for label in range(min(classes, len(records.objects))):
        if not records.objects[label]:
            continue
        own = records.classes == label
        order = np.argsort(-records.scores[own], kind="stable")
        correct = records.right[own][order][:, None, None]
        precision, _ = coco_average_precision(correct, np.zeros_like(correct), records.objects[label : label + 1])
        values.append(float(precision[0, 0]))
    return float(np.mean(values)) if values else 0.0
