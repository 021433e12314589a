"""Precision, recall and F1 of classes without detections, and their means, against the rule of YOLOv5 and ultralytics written down."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.metrics.average_precision import CURVE_POINTS, smoothed
from utils.metrics.metrics import GroundTruth, MetricAccumulator
from utils.types import Detections

RULES = ("coco", "yolov5", "ultralytics")
BOX = [10.0, 10.0, 30.0, 30.0]


def metrics(rule: str, scores: dict[int, float], *, classes: tuple[int, ...] = (0, 1, 2)):
    """One object of each class on an image of its own; ``scores`` says which were detected."""
    found = MetricAccumulator([f"c{i}" for i in range(4)], rule=rule)
    for c in classes:
        hit = [c] if c in scores else []
        boxes = torch.tensor([BOX] * len(hit)).reshape(-1, 4)
        detections = Detections(boxes, torch.tensor([scores[c] for c in hit]), torch.tensor(hit, dtype=torch.long))
        truth = GroundTruth.of_boxes(torch.tensor([0]), torch.tensor([c]), torch.tensor([[10.0, 10.0, 20.0, 20.0]]))
        found.update([detections], truth, images=[c])
    return found.compute()


@pytest.mark.parametrize("rule", RULES)
def test_precision_of_a_class_without_detections_is_zero(rule: str) -> None:
    result = metrics(rule, {0: 0.9})
    np.testing.assert_array_equal(result.precision_per_class[:3], [1, 0, 0])
    np.testing.assert_array_equal(result.recall_per_class[:3], [1, 0, 0])
    assert np.isnan(result.precision_per_class[3])
    assert (result.precision, result.recall) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    for curve in (result.curves.precision, result.curves.recall, result.curves.f1):
        assert not curve[1:3].any()


@pytest.mark.parametrize("rule", RULES)
def test_nothing_detected_at_all_gives_zeros(rule: str) -> None:
    result = metrics(rule, {})
    assert (result.precision, result.recall, result.map50, result.map, result.fitness) == (0, 0, 0, 0, 0)
    table = [line.split()[3:] for line in result.table().splitlines()[1:]]
    assert {value for row in table for value in row} == {"0.000"}


@pytest.mark.parametrize("rule", RULES)
def test_means_are_those_of_the_published_rule(rule: str) -> None:
    """Zeros where a class has no detection; else interpolated over confidence, 1 above its best score; at the best smoothed mean F1."""
    scores = {0: 0.9, 1: 0.4}
    result = metrics(rule, scores)
    precision, recall = np.zeros((2, 3, 1000))
    for c, score in scores.items():
        precision[c], recall[c] = 1, score >= CURVE_POINTS
    f1 = 2 * precision * recall / (precision + recall + 1e-16)
    best = min(int(smoothed(f1.mean(axis=0), 0.1).argmax()), 999)
    assert result.confidence == pytest.approx(CURVE_POINTS[best])
    np.testing.assert_allclose(result.precision_per_class[:3], precision[:, best])
    np.testing.assert_allclose(result.recall_per_class[:3], recall[:, best])
    assert (result.precision, result.recall) == (pytest.approx(precision[:, best].mean()), pytest.approx(recall[:, best].mean()))
