"""Metrics against pycocotools on made-up data with every complication, and the ordinary edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from utils.metrics.coco_eval import as_coco_documents, run_pycocotools
from utils.metrics.matching import rank_in_group
from utils.metrics.metrics import GroundTruth, MetricAccumulator
from utils.types import Detections

NAMES = ("a", "b", "c")
NONE = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
NO_TRUTH = GroundTruth.of_boxes(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))


def one_box(label: int = 0, image: int = 0) -> GroundTruth:
    return GroundTruth.of_boxes(torch.tensor([image]), torch.tensor([label]), torch.tensor([[10.0, 10.0, 40.0, 40.0]]))


def hit(score: float = 0.9, label: int = 0) -> Detections:
    return Detections(torch.tensor([[10.0, 10.0, 50.0, 50.0]]), torch.tensor([score]), torch.tensor([label]))


def hard_case(seed: int, *, images: int = 40, dense: bool = False) -> MetricAccumulator:
    """Crowds, ties in score and overlap, integer boxes that hit thresholds exactly, images with nothing, over 100 boxes of a class."""
    rng = np.random.default_rng(seed)
    accumulator = MetricAccumulator(NAMES)
    for image in range(images):
        m = int(rng.integers(0, 30 if dense else 6))
        size = np.exp(rng.normal(3.8, 1.0, (m, 2))).clip(2, 300).round()
        truth = np.hstack((rng.integers(0, 100, (m, 2)), size))
        n = 160 if dense else int(rng.integers(0, 25))
        boxes = np.hstack((rng.integers(0, 100, (n, 2)), np.exp(rng.normal(3.8, 1.0, (n, 2))).round() + 1)).astype(float)
        if m and n:
            near = rng.random(n) < 0.7
            boxes[near] = (truth[rng.integers(0, m, n)] + rng.integers(-3, 4, (n, 4)))[near]
            boxes[:, 2:] = boxes[:, 2:].clip(min=1)
        score = (rng.random(n) * 12).round() / 12 if seed % 2 else rng.random(n)
        order = np.argsort(-score, kind="stable")
        xyxy = np.hstack((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]))[order]
        classes = rng.integers(0, 2 if seed % 3 else 3, n)[order]
        detections = Detections(*map(torch.from_numpy, (xyxy, score[order], classes)))
        area = truth[:, 2:].prod(axis=1) * rng.uniform(0.4, 1, m)
        columns = (np.zeros(m, dtype=int), rng.integers(0, 2, m), truth, area, rng.random(m) < 0.15)
        accumulator.update([detections], GroundTruth(*map(torch.from_numpy, columns)), images=[image])
    return accumulator


@pytest.mark.parametrize("seed", range(8))
def test_coco_rule_equals_pycocotools(seed: int) -> None:
    accumulator = hard_case(seed, images=12 if seed > 5 else 40, dense=seed > 5)
    expected = run_pycocotools(*as_coco_documents(accumulator))
    found = accumulator.compute().coco_stats
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.02 < found["AP"] < 0.95


def test_perfect_detections_score_one() -> None:
    metrics = MetricAccumulator(NAMES)
    metrics.update([hit(), hit(0.8, 1)], GroundTruth.cat([one_box(), one_box(1, 1)]), images=["x", "y"])
    result = metrics.compute()
    assert (result.map, result.map50, result.precision, result.recall, result.fitness) == pytest.approx((1, 1, 1, 1, 1))
    assert np.isnan(result.ap[2]).all()
    assert result.instances.tolist() == result.images_with.tolist() == [1, 1, 0]
    assert result.confusion.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    small, medium, large = result.map_by_size
    assert math.isnan(small)
    assert medium == pytest.approx(1)
    assert math.isnan(large)


@pytest.mark.parametrize("rule", ["coco", "yolov5", "ultralytics"])
@pytest.mark.parametrize(("detections", "truth"), [(NONE, NO_TRUTH), (hit(), NO_TRUTH), (NONE, one_box()), (hit(0.9, 2), one_box())])
def test_reports_without_detections_or_objects_are_zero(rule: str, detections: Detections, truth: GroundTruth) -> None:
    metrics = MetricAccumulator(NAMES, rule=rule)
    metrics.update([detections], truth, images=["x"])
    result = metrics.compute()
    assert (result.map50, result.map, result.fitness) == (0, 0, 0)
    assert result.confusion.sum() == max(len(detections.scores), len(truth.image))
    assert f"rule: {rule}" in result.table()


def test_metric_without_updates_reports_zero() -> None:
    result = MetricAccumulator(NAMES).compute()
    assert (result.images, result.map) == (0, 0.0)
    assert set(result.coco_stats.values()) == {-1.0}


def test_every_table_says_its_rule_and_lists_the_classes_that_have_objects() -> None:
    metrics = hard_case(0).compute()
    lines = metrics.table().splitlines()
    assert "rule: coco" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["all", "a", "b"]


def test_crowds_are_ignored() -> None:
    crowd = one_box().replace(crowd=torch.tensor([True]))
    both = GroundTruth.cat([crowd, one_box(0, 1)])
    metrics = MetricAccumulator(NAMES)
    metrics.update([hit(0.99), hit(0.5)], both, images=["x", "y"])
    result = metrics.compute()
    assert result.map == pytest.approx(1)
    assert result.instances.tolist() == [1, 0, 0]
    assert result.confusion.sum() == 1


def test_older_rule_credits_recall_that_was_never_reached() -> None:
    values = {}
    for rule in ("coco", "ultralytics", "yolov5"):
        metrics = MetricAccumulator(NAMES, rule=rule)
        metrics.update([hit(), NONE], GroundTruth.cat([one_box(), one_box(0, 1)]), images=["x", "y"])
        values[rule] = metrics.compute().map
    assert values == pytest.approx({"coco": 51 / 101, "ultralytics": 0.495, "yolov5": 0.75}, abs=1e-3)


def test_merged_shards_equal_one_process() -> None:
    whole = hard_case(1)
    state = whole.state()
    parts = [MetricAccumulator(NAMES) for _ in range(3)]
    for rank, part in enumerate(parts):
        images = [*range(rank, 40, 3), 0]  # image 0 pads every shard
        for image in dict.fromkeys(images):
            rows = [state[k][state[k][:, 0] == image] for k in ("detections", "truth")]
            rows = [np.column_stack((np.zeros(len(r)), r[:, 1:])) for r in rows]
            part.merge({"images": [image], "detections": rows[0], "truth": rows[1]})
    merged = MetricAccumulator(NAMES)
    for part in reversed(parts):
        merged.merge(part.state())
    a, b = merged.compute(), whole.compute()
    assert a.coco_stats == b.coco_stats
    np.testing.assert_array_equal(a.confusion, b.confusion)
    np.testing.assert_array_equal(a.ap, b.ap)
    assert (a.images, a.precision, a.recall) == (b.images, b.precision, b.recall)


def test_confusion_matrix_counts_misses_and_false_positives() -> None:
    metrics = MetricAccumulator(NAMES)
    metrics.update([hit(0.9, 1), hit(0.9, 2), hit(0.2)], one_box(), images=["wrong class", "no object", "unsure"])
    result = metrics.compute().confusion
    assert result[1, 0] == 1
    assert result[2, 3] == 1
    assert result.sum() == 2


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="coco"):
        MetricAccumulator(NAMES, rule="voc")


@pytest.mark.parametrize("key", [[], [3], [2, 1, 2, 2, 1], [5, 5, 5]])
def test_rank_within_group_is_computed(key: list[int]) -> None:
    found = rank_in_group(np.array(key, dtype=np.int64))
    assert found.tolist() == [key[:i].count(k) for i, k in enumerate(key)]
