"""Metrics of rotated boxes: average precision by the exact overlap of their polygons, and by ProbIoU beside it.

ProbIoU of two boxes is larger than their overlap where they are nearly square, since their Gaussians then hardly turn: numbers by the two
do not compare. The fitness, and all that has no other name, is by the polygons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.metrics.matching import Array, Objects, Similarity
from utils.metrics.metrics import MetricAccumulator, Metrics
from utils.rotated.overlap import rotated_iou
from utils.rotated.probiou import probiou

PROBIOU_COLUMNS = ("metrics/mAP_0.5(prob)", "metrics/mAP_0.5:0.95(prob)")


@dataclass(frozen=True)
class RotatedMetrics(Metrics):
    """What one evaluation found, and the two means by ProbIoU."""

    map50_by_probiou: float = 0.0
    map_by_probiou: float = 0.0

    @property
    def columns(self) -> dict[str, float]:
        return {**super().columns, **dict(zip(PROBIOU_COLUMNS, (self.map50_by_probiou, self.map_by_probiou)))}

    @property
    def details(self) -> dict[str, object]:
        return {**super().details, "overlap": "polygon"}

    @property
    def remarks(self) -> list[str]:
        by_probiou = f"by ProbIoU, as others print it: mAP50 {self.map50_by_probiou:.3f}, mAP50-95 {self.map_by_probiou:.3f}"
        return [by_probiou, *super().remarks]


class RotatedAccumulator(MetricAccumulator):
    """Collects boxes before they are turned and their field ``angle``, and measures by the polygons and by ProbIoU."""

    def __init__(self, names: Sequence[str] | Mapping[int, str], *, rule: str = "coco") -> None:
        super().__init__(names, rule=rule, similarity=polygon_overlap, fields=("angle",), result=RotatedMetrics)

    def compute(self) -> RotatedMetrics:
        by_polygon, by_probiou = super().compute(), self._by(probabilistic_overlap).compute()
        assert isinstance(by_polygon, RotatedMetrics)
        return replace(by_polygon, map50_by_probiou=by_probiou.map50, map_by_probiou=by_probiou.map)

    def _by(self, similarity: Similarity) -> MetricAccumulator:
        """An accumulator with the same content that compares in another way."""
        other = MetricAccumulator(self.names, rule=self.rule, similarity=similarity, fields=tuple(self.fields))
        other.merge(self.state())
        return other


def polygon_overlap(dets: Objects, truth: Objects, d: NDArray, g: NDArray) -> Array:
    """Intersection over union (p,) of pairs of rotated boxes, in float64; boxes whose circles are apart are not compared."""
    found, near = np.zeros(len(d)), _near(dets, truth, d, g)
    found[near] = rotated_iou(_boxes(dets, d[near]), _boxes(truth, g[near])).numpy()
    return found


def probabilistic_overlap(dets: Objects, truth: Objects, d: NDArray, g: NDArray) -> Array:
    """ProbIoU (p,) of pairs of rotated boxes, in float64."""
    return probiou(_boxes(dets, d), _boxes(truth, g)).numpy()


def _boxes(objects: Objects, rows: NDArray) -> Tensor:
    """(p, 5) centre, size, angle."""
    ltwh, angle = objects.boxes_ltwh[rows], objects.fields["angle"][rows].reshape(-1, 1)
    boxes = np.concatenate((ltwh[:, :2] + ltwh[:, 2:] / 2, ltwh[:, 2:], angle), axis=1)
    return torch.from_numpy(boxes.astype(np.float64))


def _near(dets: Objects, truth: Objects, d: NDArray, g: NDArray) -> NDArray[np.int64]:
    """Which pairs are not farther from each other than the circles around them reach."""
    centres = [o.boxes_ltwh[rows, :2] + o.boxes_ltwh[rows, 2:] / 2 for o, rows in ((dets, d), (truth, g))]
    reach = [np.hypot(*np.abs(o.boxes_ltwh[rows, 2:]).T) / 2 for o, rows in ((dets, d), (truth, g))]
    return np.flatnonzero(np.hypot(*(centres[0] - centres[1]).T) <= reach[0] + reach[1])
