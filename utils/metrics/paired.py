"""Metrics of tasks whose objects have a box and something more, such as a mask: both are measured over the same detections.

Columns carry what they are about: ``metrics/mAP_0.5(B)`` of boxes, ``(M)`` of masks. The fitness is the mean of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.metrics.columns import METRIC_COLUMNS
from utils.metrics.matching import box_overlap
from utils.metrics.metrics import MetricAccumulator, Metrics
from utils.text_table import text_table

BOX = "B"


@dataclass(frozen=True)
class PairedMetrics:
    """What one evaluation found of boxes, and of what the task adds to them."""

    box: Metrics
    own: Metrics
    mark: str  # of the task's columns: "M"
    noun: str  # of what it adds: "mask"
    losses: Mapping[str, float] = field(default_factory=dict)
    speed_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Metrics]:
        """By mark, boxes first."""
        return {BOX: self.box, self.mark: self.own}

    @property
    def fitness(self) -> float:
        """What best.pt is chosen by: the mean of that of boxes and that of the task's own."""
        return (self.box.fitness + self.own.fitness) / 2

    @property
    def columns(self) -> dict[str, float]:
        """The values that results.csv has."""
        return {f"{name}({mark})": value for mark, part in self.parts.items() for name, value in part.columns.items()}

    @property
    def headline(self) -> tuple[str, float]:
        """The number by which models are compared: the task's own."""
        return f"{self.noun} mAP50-95", self.own.map

    @property
    def class_ap(self) -> list[float]:
        """mAP@0.5:0.95 of each class by the task's own measure, NaN for one without objects."""
        return self.own.class_ap

    @property
    def details(self) -> dict[str, Any]:
        """What metrics.json has beside the columns: of boxes under their own names, of the other under its noun."""
        return {**self.box.details, self.noun: self.own.details}

    @property
    def class_rows(self) -> list[dict[str, Any]]:
        """The rows of per_class.csv: those of boxes with marked columns, and those of the other beside them."""
        kept = ("class", "images", "objects", "rule")

        def marked(row: Mapping[str, Any], mark: str) -> dict[str, Any]:
            return {f"{key}({mark})": value for key, value in row.items() if key not in kept}

        rows = zip(self.box.class_rows, self.own.class_rows)
        return [{**{k: box[k] for k in kept}, **marked(box, BOX), **marked(own, self.mark)} for box, own in rows]

    @property
    def pr_curve(self) -> dict[str, NDArray[np.float64]]:
        """Precision over evenly spaced recalls: the recalls, then the columns of both with their marks."""
        curves = {mark: part.pr_curve for mark, part in self.parts.items()}
        found = {"recall": curves[BOX]["recall"]}
        return found | {f"{k}({mark})": v for mark, curve in curves.items() for k, v in curve.items() if k != "recall"}

    @property
    def remarks(self) -> list[str]:
        """What the table leaves out, for the console."""
        return [f"{noun}: {line}" for noun, part in (("box", self.box), (self.noun, self.own)) for line in part.remarks]

    def table(self, *, per_class: bool = True) -> str:
        """The usual table as text, with both measures beside each other."""
        box, own = self.box, self.own

        def row(name: str, images: int, objects: int, values: Sequence[float]) -> tuple[str, ...]:
            return (name, str(images), str(objects), *(f"{v:.3f}" for v in values))

        totals = [v for m in (box, own) for v in (m.precision, m.recall, m.map50, m.map)]
        rows = [row("all", box.images, int(box.instances.sum()), totals)]
        for c in np.flatnonzero(box.instances) if per_class else ():
            values = [v for m in (box, own) for v in (m.precision_per_class[c], m.recall_per_class[c], m.ap[c, 0], m.ap[c].mean())]
            rows.append(row(box.names[c], int(box.images_with[c]), int(box.instances[c]), values))
        titles = [f"{title}({mark})" for mark in self.parts for title in ("P", "R", "mAP50", "mAP50-95")]
        head, *body = text_table([("class", "images", "objects", *titles), *rows], right=range(11)).splitlines()
        return "\n".join((f"{head}   rule: {box.rule}", *body))


class PairedAccumulator(MetricAccumulator):
    """Collects once and measures twice: by the similarity that it is given, and by the overlap of boxes.

    Args:
        mark: of the columns of its own measure.
        noun: what that is about.
        settings: of :class:`MetricAccumulator`.
    """

    def __init__(self, names: Sequence[str] | Mapping[int, str], *, mark: str, noun: str, **settings: Any) -> None:
        super().__init__(names, **settings)
        self.mark, self.noun = mark, noun

    def compute(self) -> PairedMetrics:  # type: ignore[override]
        """Both metrics of everything that was added."""
        boxes = MetricAccumulator(self.names, rule=self.rule, similarity=box_overlap)
        boxes.merge({**self.state(), "fields": {}})
        return PairedMetrics(boxes.compute(), super().compute(), self.mark, self.noun)


def paired_columns(mark: str) -> tuple[str, ...]:
    """The columns of both measures, those of boxes first."""
    return tuple(f"{name}({kind})" for kind in (BOX, mark) for name in METRIC_COLUMNS)
