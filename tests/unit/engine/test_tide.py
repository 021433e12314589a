"""Kinds of detection errors: one case of each by hand, their precedence, and what mending each is worth."""

from __future__ import annotations

import numpy as np
import pytest

from engine.explain.tide import KINDS, RIGHT, ImageResult, find_errors, overlaps

BOX = (0.0, 0.0, 100.0, 100.0)
FAR = (500.0, 500.0, 600.0, 600.0)
HALF = (0.0, 0.0, 100.0, 30.0)  # IoU 0.3 with BOX


def image(detections, objects, path="a.jpg"):
    """From rows (box, score, class) and (box, class)."""
    boxes, scores, classes = zip(*detections) if detections else ((), (), ())
    true_boxes, true_classes = zip(*objects) if objects else ((), ())
    return ImageResult(
        path,
        np.array(boxes, float).reshape(-1, 4),
        np.array(scores, float),
        np.array(classes, int),
        np.array(true_boxes, float).reshape(-1, 4),
        np.array(true_classes, int),
    )


@pytest.mark.parametrize(
    ("detections", "objects", "kinds"),
    [
        ([(BOX, 0.9, 0)], [(BOX, 0)], [RIGHT]),
        ([(BOX, 0.9, 1)], [(BOX, 0)], ["class"]),
        ([(HALF, 0.9, 0)], [(BOX, 0)], ["location"]),
        ([(HALF, 0.9, 1)], [(BOX, 0)], ["both", "missed"]),
        ([(BOX, 0.9, 0), (BOX, 0.8, 0)], [(BOX, 0)], [RIGHT, "duplicate"]),
        ([(FAR, 0.9, 0)], [(BOX, 0)], ["background", "missed"]),
        ([(FAR, 0.9, 0)], [], ["background"]),
        ([], [(BOX, 0)], ["missed"]),
        ([(HALF, 0.9, 0)], [(BOX, 0), (HALF, 1)], ["location", "missed"]),  # before the class error that it could be, too
        ([], [], []),
    ],
)
def test_kind_of_each_error(detections, objects, kinds):
    report = find_errors([image(detections, objects)], classes=2)
    assert [case.kind for case in report.cases] == kinds
    assert sum(report.counts.values()) == len(kinds)


def test_better_detection_takes_the_object():
    report = find_errors([image([(BOX, 0.3, 0), (BOX, 0.9, 0)], [(BOX, 0)])], classes=1)
    assert [(case.kind, case.score) for case in report.cases] == [("duplicate", 0.3), (RIGHT, 0.9)]


@pytest.mark.parametrize("kind", KINDS)
def test_cost_is_what_mending_the_kind_brings(kind):
    wrong = {
        "class": ([(BOX, 0.9, 1)], [(BOX, 0)]),
        "location": ([(HALF, 0.9, 0)], [(BOX, 0)]),
        "both": ([(HALF, 0.9, 0)], [(BOX, 1)]),
        "duplicate": ([(BOX, 0.9, 0), (BOX, 0.8, 0)], [(BOX, 0)]),
        "background": ([(FAR, 0.9, 0)], []),
        "missed": ([], [(BOX, 0)]),
    }[kind]
    right = image([(BOX, 0.5, 0)], [(BOX, 0)])
    report = find_errors([image(*wrong), right], classes=2)
    if kind != "both":  # which costs nothing alone here: the class of the object that is missed has AP 0 anyway
        assert report.cost[kind] > 0.05
    assert all(report.cost[other] >= -1e-9 for other in KINDS)
    if kind in ("class", "location", "missed", "duplicate", "background"):
        assert report.ap50 + report.cost[kind] == pytest.approx(1.0)


def test_perfect_and_empty_sets_have_no_costs():
    report = find_errors([image([(BOX, 0.9, 0)], [(BOX, 0)])], classes=3)
    assert report.ap50 == pytest.approx(1.0)
    assert set(report.cost.values()) == {0.0}
    empty = find_errors([], classes=3)
    assert (empty.ap50, empty.cases) == (0.0, [])


def test_ap_equals_that_of_validation():
    import torch

    from tasks import DETECT
    from utils.metrics.metrics import GroundTruth
    from utils.types import Detections

    rng = np.random.default_rng(0)
    images = []
    metric = DETECT.metric(["a", "b", "c"])
    for number in range(12):
        corner = rng.uniform(0, 200, (6, 2))
        objects = np.concatenate((corner, corner + rng.uniform(20, 90, (6, 2))), 1)
        boxes = np.concatenate((objects + rng.normal(0, 8, objects.shape), rng.permutation(objects)))
        result = ImageResult(str(number), boxes, rng.permutation(12) / 13 + 0.01, rng.integers(0, 3, 12), objects, rng.integers(0, 3, 6))
        images.append(result)
        order = np.argsort(-result.scores)
        found = Detections(*(torch.from_numpy(np.ascontiguousarray(part[order])) for part in (boxes, result.scores, result.classes)))
        ltwh = np.concatenate((objects[:, :2], objects[:, 2:] - objects[:, :2]), 1)
        truth = GroundTruth.of_boxes(torch.zeros(6, dtype=torch.long), torch.from_numpy(result.true_classes), torch.from_numpy(ltwh))
        metric.update([found], truth, images=[number])
    assert find_errors(images, classes=3).ap50 == pytest.approx(metric.compute().map50, abs=1e-6)


def test_overlaps_of_nothing_are_empty():
    assert overlaps(np.zeros((0, 4)), np.zeros((3, 4))).shape == (0, 3)
