"""Average precision, confusion, fitness and smoothing against published code and pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.golden import assert_close, find
from utils.metrics.average_precision import smoothed
from utils.metrics.columns import METRIC_COLUMNS, fitness
from utils.metrics.matching import Objects, match_yolov5
from utils.metrics.metrics import COCO_STATS, GroundTruth, MetricAccumulator, Metrics
from utils.types import Detections

NC = 10


def accumulator(rule: str) -> MetricAccumulator:
    result = MetricAccumulator([str(i) for i in range(NC)], rule=rule)
    for image in range(find("ops", "map_synth").meta["args"]["images"]):
        add_image(result, image)
    return result


def add_image(accumulator: MetricAccumulator, image: int) -> None:
    arrays = find("ops", "map_synth").arrays
    dets, rows = (torch.from_numpy(a[a[:, 0] == image]) for a in (arrays["det"], arrays["gt"]))
    ltwh = torch.cat((rows[:, 2:4], rows[:, 4:6] - rows[:, 2:4]), dim=1)
    truth = GroundTruth.of_boxes(torch.zeros(len(rows), dtype=torch.long), rows[:, 1].long(), ltwh)
    accumulator.update([Detections(dets[:, 1:5], dets[:, 5], dets[:, 6].long())], truth, images=[image])


@pytest.fixture(scope="module")
def coco() -> Metrics:
    return accumulator("coco").compute()


def test_coco_rule_equals_pycocotools(coco: Metrics) -> None:
    g = find("ops", "map_synth")
    found = np.array([coco.coco_stats[name] for name in COCO_STATS])
    np.testing.assert_allclose(found, g.arrays["coco_stats"], atol=1e-9, rtol=0)
    np.testing.assert_allclose(coco.ap.mean(axis=1), g.arrays["coco_ap_per_class"], atol=1e-9)
    np.testing.assert_allclose(coco.ap[:, 0], g.arrays["coco_ap50_per_class"], atol=1e-9)


@pytest.mark.parametrize(("rule", "name"), [("yolov5", "map_synth"), ("yolov5", "map_synth_v5"), ("ultralytics", "map_synth_ultralytics")])
def test_other_ap_rules_match_the_reference(rule: str, name: str) -> None:
    g = find("ops", name)
    metrics = accumulator(rule).compute()
    for key, found in (("precision", metrics.precision_per_class), ("recall", metrics.recall_per_class), ("ap", metrics.ap)):
        np.testing.assert_allclose(found, g.arrays[key], atol=1e-12)
    np.testing.assert_allclose([metrics.map50, metrics.map], [g.arrays["map50"], g.arrays["map"]], atol=1e-12)
    right = (metrics.recall_per_class * metrics.instances).round()
    np.testing.assert_array_equal(right, g.arrays["tp"])
    np.testing.assert_array_equal((right / metrics.precision_per_class - right).round(), g.arrays["fp"])


@pytest.mark.parametrize("name", ["map_synth", "map_synth_v5"])
def test_yolov5_matching_matches_the_reference(name: str) -> None:
    """Which detections are right, row by row and threshold by threshold."""
    synth = find("ops", "map_synth").arrays

    def objects(image: np.ndarray, label: np.ndarray, xyxy: np.ndarray) -> Objects:
        ltwh = np.hstack((xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2])).astype(np.float64)
        n = len(image)
        return Objects(image.astype(int), label.astype(int), ltwh, np.ones(n), np.ones(n), np.zeros(n, dtype=bool))

    dets, truth = synth["det"], synth["gt"]
    found = match_yolov5(objects(dets[:, 0], dets[:, 6], dets[:, 1:5]), objects(truth[:, 0], truth[:, 1], truth[:, 2:6]))
    np.testing.assert_array_equal(found.correct[..., 0], find("ops", name).arrays["correct"])


def test_confusion_matrix_matches_the_reference() -> None:
    """The published code forgets false positives of images without a pair; ours are the same without these images' detections."""
    g = find("ops", "map_synth")
    found = np.zeros((NC + 1, NC + 1), dtype=int)
    for image in range(g.meta["args"]["images"]):
        one = MetricAccumulator([str(i) for i in range(NC)])
        add_image(one, image)
        matrix = one.compute().confusion
        if not matrix[:NC, :NC].any():
            matrix[:, NC] = 0
        found += matrix
    np.testing.assert_array_equal(found, g.arrays["confusion"])


def test_fitness_matches_the_reference() -> None:
    g = find("ops", "fitness_v9")
    assert_close(fitness({name: g.arrays["x"][:, i] for i, name in enumerate(METRIC_COLUMNS)}), g.arrays["fitness"], 1e-12)
    assert accumulator("yolov5").compute().fitness == pytest.approx(float(find("ops", "map_synth").arrays["fitness"][0]), abs=1e-12)


def test_smoothing_matches_the_reference() -> None:
    g = find("ops", "smooth_v9")
    for fraction, key in ((0.05, "f05"), (0.1, "f10")):
        assert_close(smoothed(g.arrays["y"], fraction), g.arrays[key], 1e-12)
