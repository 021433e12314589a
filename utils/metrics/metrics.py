"""Detection metrics over a data set: collect with ``MetricAccumulator``, get one frozen ``Metrics``.

Every number carries its rule. ``coco`` equals pycocotools (100 detections per image and class, greedy matching, 101 points, crowds
ignored); ``yolov5`` gives what YOLOv5, v7 and v9 print, for comparison with older papers; ``ultralytics`` what newer YOLOv8 code prints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.boxes import xyxy_to_ltwh
from utils.metrics.average_precision import (
    CURVE_POINTS,
    EPS,
    Array,
    Curves,
    Rule,
    coco_average_precision,
    confidence_curves,
    smoothed,
    trapezoid_average_precision,
)
from utils.metrics.columns import METRIC_COLUMNS, fitness
from utils.metrics.confusion import confusion_matrix
from utils.metrics.matching import (
    AREA_RANGES,
    IOU_THRESHOLDS,
    Objects,
    Similarity,
    box_overlap,
    match_coco,
    match_yolov5,
    rank_in_group,
)
from utils.text_table import text_table
from utils.types import Columns, Detections

Stored = Callable[[NDArray], NDArray]  # a field (n, …) as the accumulator keeps it, (n, …)
COCO_MAX_DETECTIONS = (1, 10, 100)  # per image and class
SIZES = ("small", "medium", "large")
COCO_STATS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")


@dataclass(frozen=True)
class GroundTruth(Columns):
    """The objects of a batch, in px of the original images."""

    image: Tensor  # (M,) int64, which image of the batch
    classes: Tensor  # (M,) int64
    boxes_ltwh: Tensor  # (M, 4) px, float64 where they come from a JSON file
    area: Tensor  # (M,) px², the annotation's area where there is one (a polygon's is smaller than its box)
    crowd: Tensor  # (M,) bool
    fields: Mapping[str, Tensor] = field(default_factory=dict)  # (M, …) what a task adds, by name

    @classmethod
    def of_boxes(cls, image: Tensor, classes: Tensor, boxes_ltwh: Tensor) -> GroundTruth:
        """Objects of which only the boxes are known."""
        return cls(image, classes, boxes_ltwh, boxes_ltwh[:, 2:].prod(dim=1), torch.zeros(len(image), dtype=torch.bool))


@dataclass(frozen=True)
class Metrics:
    """What one evaluation found. Values of classes without objects are NaN and enter no mean; means over nothing are 0."""

    rule: Rule
    names: tuple[str, ...]
    images: int
    instances: NDArray[np.int64]  # (nc,) objects per class
    images_with: NDArray[np.int64]  # (nc,) images that hold an object of the class
    precision: float  # mean over classes at ``confidence``, IoU 0.5
    recall: float
    confidence: float  # where the smoothed mean F1 is highest
    map50: float
    map: float
    ap: Array  # (nc, 10) at IoU 0.50 … 0.95
    precision_per_class: Array  # (nc,)
    recall_per_class: Array  # (nc,)
    curves: Curves
    confusion: NDArray[np.int64]  # (nc + 1, nc + 1) predicted by true, the last one is background
    coco_stats: dict[str, float]  # the 12 numbers of pycocotools, -1 for what has no object; empty with the rule yolov5
    losses: dict[str, float] = field(default_factory=dict)  # mean validation loss by part, if asked for
    speed_ms: dict[str, float] = field(default_factory=dict)  # per image and stage
    ap_by_size: Array = field(default_factory=lambda: np.full((0, 3), np.nan))  # (nc, 3) small, medium, large; empty with other rules

    @property
    def fitness(self) -> float:
        """What best.pt is chosen by: 0.1 mAP@0.5 + 0.9 mAP@0.5:0.95, unless a plugin weighs other columns."""
        return float(fitness(self.columns))

    @property
    def columns(self) -> dict[str, float]:
        """The values that results.csv has."""
        return {name: float(value(self)) for name, value in METRIC_COLUMNS.items()}

    @property
    def headline(self) -> tuple[str, float]:
        """The number by which models are compared."""
        return "mAP50-95", self.map

    @property
    def class_ap(self) -> list[float]:
        """mAP@0.5:0.95 of each class, NaN for one without objects."""
        return self.ap.mean(axis=1).tolist()

    @property
    def details(self) -> dict[str, Any]:
        """What metrics.json has beside the columns; NaN for what has no object."""
        sizes = dict(zip(SIZES, self.map_by_size))
        counts = {"rule": self.rule, "images": self.images, "objects": int(self.instances.sum()), "confidence": self.confidence}
        return {**counts, "AP75": self.map_at(0.75), "size_ap": sizes, "coco_stats": self.coco_stats}

    @property
    def class_rows(self) -> list[dict[str, Any]]:
        """The rows of per_class.csv: all, then every class; NaN for a class without objects."""
        by_size = self.ap_by_size if len(self.ap_by_size) else np.full((len(self.names), len(SIZES)), np.nan)
        means = [self.precision, self.recall, self.map50, self.map_at(0.75), self.map, *self.map_by_size]
        single = [self.precision_per_class, self.recall_per_class, self.ap[:, 0], self.ap[:, 5], self.ap.mean(axis=1), *by_size.T]
        rows = [("all", self.images, int(self.instances.sum()), means)]
        for c, name in enumerate(self.names):
            rows.append((name, int(self.images_with[c]), int(self.instances[c]), [float(values[c]) for values in single]))
        head = ("class", "images", "objects", "P", "R", "AP50", "AP75", "AP", *(f"AP_{size}" for size in SIZES), "rule")
        return [dict(zip(head, (name, images, objects, *values, self.rule))) for name, images, objects, values in rows]

    @property
    def pr_curve(self) -> dict[str, Array]:
        """Precision at IoU 0.5 over evenly spaced recalls: the recalls, the mean over classes, and every class with objects."""
        at_recall = self.curves.precision_at_recall
        present = np.flatnonzero(~np.isnan(at_recall).any(axis=1))
        mean = at_recall[present].mean(axis=0) if len(present) else np.full(len(self.curves.recall_axis), np.nan)
        return {"recall": self.curves.recall_axis, "all": mean} | {
            name if (name := self.names[c]) not in ("recall", "all") else f"class {name}": at_recall[c] for c in present
        }

    @property
    def remarks(self) -> list[str]:
        """What the table leaves out, for the console."""
        sizes = ", ".join(f"{name} {value:.3f}" for name, value in zip(SIZES, self.map_by_size) if value == value)
        by_size = [f"mAP50-95 by size (rule: {self.rule}): {sizes}"] if sizes else []
        return [*by_size, f"P and R at confidence {self.confidence:.3f}, where F1 is highest (IoU 0.5)"]

    def map_at(self, iou: float) -> float:
        """mAP at one of the thresholds 0.50, 0.55 … 0.95."""
        return _mean(self.ap[:, int(np.abs(IOU_THRESHOLDS - iou).argmin())])

    @property
    def map_by_size(self) -> tuple[float, float, float]:
        """mAP@0.5:0.95 of small, medium and large objects (COCO: 32² and 96² px²); NaN where there is none."""
        values = (self.coco_stats.get(f"AP_{size}", -1.0) for size in SIZES)
        small, medium, large = (v if v >= 0 else math.nan for v in values)
        return small, medium, large

    def table(self, *, per_class: bool = True) -> str:
        """The usual table as text: a row for all, then one for each class that has objects."""
        measured = (self.precision, self.recall, self.map50, self.map)
        rows = [("all", self.images, int(self.instances.sum()), *measured)]
        for c in np.flatnonzero(self.instances) if per_class else ():
            measured = (self.precision_per_class[c], self.recall_per_class[c], self.ap[c, 0], self.ap[c].mean())
            rows.append((self.names[c], int(self.images_with[c]), int(self.instances[c]), *measured))
        lines = [(name, str(images), str(objects), *(f"{v:.3f}" for v in values)) for name, images, objects, *values in rows]
        head, *body = text_table([("class", "images", "objects", "P", "R", "mAP50", "mAP50-95"), *lines], right=range(7)).splitlines()
        return "\n".join((f"{head}   rule: {self.rule}", *body))


class MetricAccumulator:
    """Collects detections and objects of any number of batches, on any number of processes.

    Example:
        >>> metrics = MetricAccumulator(("cat", "dog"))
        >>> metrics.update(detections, truth, images=paths)
        >>> metrics.compute().map50
    """

    def __init__(
        self,
        names: Sequence[str] | Mapping[int, str],
        *,
        rule: str = "coco",
        similarity: Similarity = box_overlap,
        fields: Mapping[str, Stored] | Sequence[str] = (),
        area: Callable[[Objects], Array] | None = None,
        result: type[Metrics] = Metrics,
    ) -> None:
        """
        Args:
            names: Class names.
            rule: ``coco``, ``yolov5`` or ``ultralytics``.
            similarity: How alike a detection and an object are; overlap of boxes for detection.
            fields: Names of the fields of detections and ground truth that ``similarity`` reads, with the form in which each is kept if
                that is another than the array (n, …) itself.
            area: px² (n,) of detections, by which COCO's rule leaves out small and large ones; that of their boxes if not given.
            result: What ``compute`` gives; a class of its own says other columns.

        Raises:
            ValueError: an unknown rule.
        """
        if rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, not {rule!r}")
        self.names = tuple(names[i] for i in range(len(names)))
        self.rule = cast(Rule, rule)
        self.similarity, self.area, self.result = similarity, area, result
        self.fields: dict[str, Stored] = dict(fields) if isinstance(fields, Mapping) else dict.fromkeys(fields, np.asarray)
        self._fields: dict[str, dict[str, list[NDArray]]] = {kind: {name: [] for name in fields} for kind in ("detections", "truth")}
        self._images: list[int | str] = []
        self._dets: list[NDArray[np.float64]] = []  # (n, 7) image, class, left, top, width, height, score
        self._truth: list[NDArray[np.float64]] = []  # (m, 8) image, class, left, top, width, height, area, crowd

    @property
    def coco_kinds(self) -> Mapping[str, Mapping[str, Any]]:
        """What pycocotools can measure of it, and with which options."""
        return {"bbox": {}}

    def update(self, detections: Sequence[Detections], truth: GroundTruth, *, images: Sequence[int | str]) -> None:
        """Adds a batch.

        Args:
            detections: One per image, boxes xyxy in px of the original image.
            truth: The objects of the batch.
            images: A name or number for each image, unique in the data set. Equal scores are ordered by it, as COCO does by image id.
        """
        start = len(self._images)
        self._images.extend(images)
        number = torch.arange(start, start + len(images))
        image = number.repeat_interleave(torch.tensor([len(d.scores) for d in detections], dtype=torch.long))
        boxes = xyxy_to_ltwh(torch.cat([d.boxes for d in detections]).double().cpu())
        label, score = torch.cat([d.classes for d in detections]).cpu(), torch.cat([d.scores for d in detections]).cpu()
        self._dets.append(torch.cat((_columns(image, label), boxes, _columns(score)), dim=1).numpy())
        objects = truth.cpu()
        for name, stored in self.fields.items():
            self._fields["detections"][name] += [stored(d.fields[name].cpu().numpy()) for d in detections]
            self._fields["truth"][name].append(stored(objects.fields[name].numpy()))
        known = (_columns(objects.image + start, objects.classes), objects.boxes_ltwh.double(), _columns(objects.area, objects.crowd))
        self._truth.append(torch.cat(known, dim=1).numpy())

    def state(self) -> dict[str, Any]:
        """All that was collected, as a list and two arrays: what another process sends to be merged."""
        return {
            "images": list(self._images),
            "detections": np.concatenate(self._dets) if self._dets else np.zeros((0, 7)),
            "truth": np.concatenate(self._truth) if self._truth else np.zeros((0, 8)),
            "fields": {kind: {n: np.concatenate(parts) for n, parts in columns.items() if parts} for kind, columns in self._fields.items()},
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Adds what another accumulator collected; images that are here already (padding of the shards) are left out."""
        known = set(self._images)
        new = np.array([name not in known for name in state["images"]], dtype=bool)
        place = np.cumsum(new) - 1 + len(self._images)
        for kind, mine in (("detections", self._dets), ("truth", self._truth)):
            rows = state[kind]
            image = rows[:, 0].astype(np.int64)
            kept = new[image]
            mine.append(np.column_stack((place[image[kept]], rows[kept][:, 1:])))
            for name, values in state.get("fields", {}).get(kind, {}).items():
                self._fields[kind][name].append(values[kept])
        self._images.extend(name for name, is_new in zip(state["images"], new) if is_new)

    def compute(self) -> Metrics:
        """The metrics of everything that was added. The order of the additions does not matter."""
        return self.result(**self.measure(self.compared()))

    def compared(self) -> Compared:
        """What the headline number compares."""
        return Compared(*self.objects(), self.similarity, BOX_RULE)

    def measure(self, compared: Compared) -> dict[str, Any]:
        """The fields of :class:`Metrics` for what is compared."""
        dets, truth, similarity, coco = compared
        nc = len(self.names)
        counted = truth.take(~truth.crowd)
        instances = np.bincount(counted.label, minlength=nc)
        images_with = np.bincount(np.unique(counted.image * nc + counted.label) % nc, minlength=nc)
        if self.rule == "coco":
            ap, by_size, curves, stats = _coco(dets, truth, nc, similarity, coco)
        else:
            by_size, stats = np.full((nc, len(SIZES)), np.nan), {}
            ap, curves = _trapezoid(dets, counted, nc, similarity, rule=self.rule)
        present = ~np.isnan(curves.f1).any(axis=1)  # a class whose objects all are ignored has none
        best = int(smoothed(curves.f1[present].mean(axis=0), 0.1).argmax()) if present.any() else 0
        best = min(best, len(CURVE_POINTS) - 1)
        precision, recall = curves.precision[:, best], curves.recall[:, best]
        return {
            "rule": self.rule,
            "names": self.names,
            "images": len(self._images),
            "instances": instances,
            "images_with": images_with,
            "precision": _mean(precision),
            "recall": _mean(recall),
            "confidence": float(CURVE_POINTS[best]),
            "map50": _mean(ap[:, 0]),
            "map": _mean(ap),
            "ap": ap,
            "precision_per_class": precision,
            "recall_per_class": recall,
            "curves": curves,
            "confusion": confusion_matrix(dets, truth, nc=nc, similarity=similarity),
            "coco_stats": stats,
            "ap_by_size": by_size,
        }

    def objects(self) -> tuple[Objects, Objects]:
        """Detections sorted by image, class and score, and objects; images numbered in the order of their names."""
        state = self.state()
        order = sorted(range(len(self._images)), key=lambda i: (isinstance(self._images[i], str), self._images[i]))
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        det, truth = state["detections"], state["truth"]
        image, label = place[det[:, 0].astype(np.int64)], det[:, 1].astype(np.int64)
        sort = np.lexsort((-det[:, 6], label, image))
        area = det[:, 4] * det[:, 5]
        fields = state["fields"]
        dets = Objects(image, label, det[:, 2:6], det[:, 6], area, np.zeros(len(det), dtype=bool), fields["detections"]).take(sort)
        dets = dets if self.area is None else dets._replace(area=self.area(dets))
        where, what = place[truth[:, 0].astype(np.int64)], truth[:, 1].astype(np.int64)
        return dets, Objects(where, what, truth[:, 2:6], np.ones(len(truth)), truth[:, 6], truth[:, 7] > 0, fields["truth"])


class CocoCounts(NamedTuple):
    """Average precision and recall by COCO's rule, NaN where there is nothing to be found."""

    ap: Array  # (nc, T, A) at T overlaps, for A ranges of area
    recall: Array  # (nc, T, A)
    few: Array  # (nc, T, M) recall over all areas with at most so many detections of an image


class CocoRule(NamedTuple):
    """What COCO's rule counts of a kind of result, and the numbers that pycocotools gives for it."""

    limits: tuple[int, ...]  # most detections of an image and class, the last one counts
    stats: Callable[[CocoCounts], dict[str, Array]]  # values by name; their mean is given, -1 for what has no object


class Compared(NamedTuple):
    """What one measure compares, and how."""

    dets: Objects  # sorted by image, class and score
    truth: Objects
    similarity: Similarity  # how alike a detection and an object are
    coco: CocoRule  # what COCO's rule counts and gives


def _box_stats(counts: CocoCounts) -> dict[str, Array]:
    ap, recall, few = counts
    values = [ap[..., 0], ap[:, 0, 0], ap[:, 5, 0], *(ap[..., a] for a in (1, 2, 3))]
    values += [*(few[..., m] for m in range(3)), *(recall[..., a] for a in (1, 2, 3))]
    return dict(zip(COCO_STATS, values))


BOX_RULE = CocoRule(COCO_MAX_DETECTIONS, _box_stats)


def _coco(
    dets: Objects, truth: Objects, nc: int, similarity: Similarity, rule: CocoRule
) -> tuple[Array, Array, Curves, dict[str, float]]:  # fmt: skip
    """Average precision (nc, 10), that by size (nc, 3), curves and pycocotools' numbers, by COCO's rule."""
    rank = rank_in_group(dets.image * nc + dets.label)
    kept = rank < rule.limits[-1]
    dets, rank = dets.take(kept), rank[kept]
    match = match_coco(dets, truth, similarity=similarity)
    inside = (truth.area[:, None] >= AREA_RANGES[:, 0]) & (truth.area[:, None] <= AREA_RANGES[:, 1]) & ~truth.crowd[:, None]
    positives = np.stack([np.bincount(truth.label[i], minlength=nc) for i in inside.T], axis=1)  # (nc, A)
    ap, recall = np.full((2, nc, len(IOU_THRESHOLDS), len(AREA_RANGES)), np.nan)
    few = np.full((nc, len(IOU_THRESHOLDS), len(rule.limits)), np.nan)
    curves = _empty_curves(nc)
    for c, rows in enumerate(_rows_of_classes(dets, nc)):
        if not positives[c].any():
            continue
        correct, ignored = match.correct[rows], match.ignored[rows]
        ap[c], recall[c] = coco_average_precision(correct, ignored, positives[c])
        for m, most in enumerate(rule.limits):
            few[c, :, m] = correct[rank[rows] < most, :, 0].sum(axis=0) / max(positives[c, 0], 1)
        counts = ~ignored[:, 0, 0]
        _fill_curves(curves, c, correct[counts, 0, 0], dets.score[rows][counts], int(positives[c, 0]))
    stats = rule.stats(CocoCounts(ap, recall, few))
    return ap[..., 0], ap[..., 1:].mean(axis=1), curves, {name: _mean(values, of_nothing=-1.0) for name, values in stats.items()}


def _trapezoid(dets: Objects, truth: Objects, nc: int, similarity: Similarity, *, rule: Rule) -> tuple[Array, Curves]:
    """Average precision (nc, 10) and curves by the rule of YOLOv5 or ultralytics, which know no crowds."""
    if rule == "yolov5":
        match = match_yolov5(dets, truth, similarity=similarity)
    else:
        match = match_coco(dets, truth, areas=AREA_RANGES[:1], similarity=similarity)
    positives = np.bincount(truth.label, minlength=nc)
    ap = np.full((nc, len(IOU_THRESHOLDS)), np.nan)
    curves = _empty_curves(nc)
    for c, rows in enumerate(_rows_of_classes(dets, nc)):
        if positives[c]:
            correct = match.correct[rows, :, 0]
            ap[c] = trapezoid_average_precision(correct, int(positives[c]), credit_unreached=rule == "yolov5")
            _fill_curves(curves, c, correct[:, 0], dets.score[rows], int(positives[c]))
    return ap, curves


def _rows_of_classes(dets: Objects, nc: int) -> list[NDArray[np.int64]]:
    """For every class its detections, best first over all images."""
    order = np.lexsort((-dets.score, dets.label))
    return np.split(order, np.searchsorted(dets.label[order], np.arange(1, nc)))


def _empty_curves(nc: int) -> Curves:
    blank = np.full((4, nc, len(CURVE_POINTS)), np.nan)
    return Curves(CURVE_POINTS, blank[0], blank[1], blank[2], CURVE_POINTS, blank[3])


def _fill_curves(curves: Curves, c: int, correct: NDArray[np.bool_], score: Array, positives: int) -> None:
    if not positives:
        return
    recall, precision, at_recall = confidence_curves(correct, score, positives)
    curves.recall[c], curves.precision[c], curves.precision_at_recall[c] = recall, precision, at_recall
    curves.f1[c] = 2 * precision * recall / (precision + recall + EPS)


def _mean(values: Array, *, of_nothing: float = 0.0) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else of_nothing


def _columns(*columns: Tensor) -> Tensor:
    return torch.stack([c.double() for c in columns], dim=1)
