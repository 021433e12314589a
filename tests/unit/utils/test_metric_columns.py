"""Columns that a plugin adds to results.csv, and the weights by which best.pt is chosen."""

from __future__ import annotations

import pytest
import torch

from tasks import DETECT
from utils.errors import UserError
from utils.metrics import columns
from utils.metrics.columns import choose_best_by, register_column
from utils.metrics.metrics import GroundTruth
from utils.types import Detections

BOX = torch.tensor([[10.0, 10.0, 60.0, 60.0]])


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """The registry of columns is left as it was found."""
    for registry in ("METRIC_COLUMNS", "FITNESS_WEIGHTS"):
        monkeypatch.setattr(columns, registry, dict(getattr(columns, registry)))
    monkeypatch.setattr("utils.metrics.metrics.METRIC_COLUMNS", columns.METRIC_COLUMNS)
    monkeypatch.setattr("tasks.detect.METRIC_COLUMNS", columns.METRIC_COLUMNS)


def metrics(shift_px: float):
    """Of one object, and one detection so far to the right of it."""
    metric = DETECT.metric(("a", "b"))
    zero = torch.zeros(1, dtype=torch.long)
    truth = GroundTruth.of_boxes(zero, zero, torch.tensor([[10.0, 10.0, 50.0, 50.0]]))
    metric.update([Detections(BOX + torch.tensor([shift_px, 0, shift_px, 0]), torch.ones(1), zero)], truth, images=["a"])
    return metric.compute()


def test_the_fitness_is_a_tenth_of_map50_and_nine_tenths_of_the_mean():
    found = metrics(5.0)  # IoU 45 / 55 = 0.82
    assert (found.map50, found.map) == (pytest.approx(1), pytest.approx(0.7))
    assert found.fitness == pytest.approx(0.1 * found.map50 + 0.9 * found.map)


def test_a_column_joins_behind_the_others_and_chooses_best():
    register_column("metrics/mAP_0.75")(lambda m: m.map_at(0.75))
    assert metrics(5.0).fitness == pytest.approx(0.73)
    choose_best_by({"metrics/mAP_0.75": 1.0})
    assert DETECT.columns[-1] == "metrics/mAP_0.75"
    assert [metrics(shift).columns["metrics/mAP_0.75"] for shift in (5.0, 10.0)] == [pytest.approx(1), 0]  # IoU 0.82, 0.67
    assert [metrics(shift).fitness for shift in (5.0, 10.0)] == [pytest.approx(1), 0]


def test_map_at_each_threshold_is_that_column_of_the_table():
    found = metrics(5.0)
    assert [found.map_at(iou) for iou in (0.5, 0.8, 0.85, 0.95)] == pytest.approx([1, 1, 0, 0])
    assert DETECT.metric(("a",)).compute().map_at(0.75) == 0


def test_what_cannot_be_a_column_is_refused():
    with pytest.raises(UserError, match="is registered already"):
        register_column("metrics/recall")
    with pytest.raises(UserError, match="must begin with metrics/"):
        register_column("AP75")
    with pytest.raises(UserError, match=r"metrics/recal.*unknown.*metrics/recall"):
        choose_best_by({"metrics/recal": 1.0})
    assert set(columns.FITNESS_WEIGHTS) == {"metrics/mAP_0.5", "metrics/mAP_0.5:0.95"}
