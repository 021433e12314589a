"""What an evaluation leaves as numbers, the console's line of an epoch, and epochs that count from 1 everywhere."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.evaluation.outputs import write_numbers
from engine.logging.callbacks import RunInfo
from engine.logging.loggers import ConsoleLogger, csv_row
from engine.study.run_outputs import read_outputs
from engine.training.resume import damage_of_table
from engine.training.run import counted_from_1
from tasks.detect import DETECT
from utils.metrics.columns import column_title
from utils.metrics.metrics import GroundTruth, MetricAccumulator
from utils.types import Detections

NAMES = ("cell", "=1+1", "absent")


def measured(rule: str = "coco") -> MetricAccumulator:
    """Two images of 100 px boxes (large) and one of 20 px (small), some found."""
    metric = MetricAccumulator(NAMES, rule=rule)
    large, small = torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([[50.0, 50, 70, 70]])
    for number, (boxes, label) in enumerate([(large, 0), (large, 1), (small, 0)]):
        found = Detections(boxes + number, torch.tensor([0.9]), torch.tensor([label]))
        width_height = boxes[:, 2:] - boxes[:, :2]
        truth = GroundTruth.of_boxes(torch.tensor([0]), torch.tensor([label]), torch.cat((boxes[:, :2], width_height), 1).double())
        metric.update([found], truth, images=[number])
    return metric


def test_the_files_hold_what_was_measured(tmp_path):
    metric = measured()
    result = metric.compute()
    write_numbers(result, tmp_path, metric, {"weights": "best.pt", "parameters": 5})
    content = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert content["metrics"]["metrics/mAP_0.5:0.95"] == pytest.approx(result.map, abs=1e-6)
    assert (content["rule"], content["images"], content["objects"], content["weights"]) == ("coco", 3, 3, "best.pt")
    assert content["size_ap"]["medium"] is None
    assert set(content["image_noise"]) == {"metrics/mAP_0.5", "metrics/mAP_0.5:0.95"}
    with (tmp_path / "per_class.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*("class", "images", "objects", "P", "R", "AP50", "AP75", "AP", "AP_small", "AP_medium", "AP_large"), "rule"]
    assert [(r["class"], r["objects"]) for r in rows] == [("all", "3"), ("cell", "2"), ("'=1+1", "1"), ("absent", "0")]
    assert float(rows[1]["AP"]) == pytest.approx(result.ap[0].mean(), abs=1e-6)
    assert (rows[1]["AP_medium"], rows[3]["AP"]) == ("", "")


def test_ap_by_size_of_each_class_has_the_means_of_the_whole(tmp_path):
    result = measured().compute()
    means = [column[~np.isnan(column)].mean() if (~np.isnan(column)).any() else math.nan for column in result.ap_by_size.T]
    np.testing.assert_allclose(means, result.map_by_size, atol=1e-12)
    assert result.ap_by_size.shape == (3, 3)
    assert np.isnan(measured("yolov5").compute().ap_by_size).all()


def test_a_study_reads_what_was_written(tmp_path):
    metric, notes = measured(), []
    result = metric.compute()
    write_numbers(result, tmp_path, metric, {"parameters": 5})
    found = read_outputs(tmp_path, notes)
    assert notes == []
    assert found.metrics["metrics/mAP_0.5"] == pytest.approx(result.map50, abs=1e-6)
    assert set(found.per_class) == set(NAMES)
    assert found.per_class["=1+1"]["AP"] == pytest.approx(result.ap[1].mean(), abs=1e-5)
    assert len(found.pr_curves["all"]) == 1000
    assert (found.parameters, set(found.per_size)) == (5, {"small", "large"})


def test_an_evaluation_of_nothing_is_ordinary(tmp_path, capsys):
    metric = MetricAccumulator(NAMES)
    write_numbers(metric.compute(), tmp_path, metric, {})
    assert json.loads((tmp_path / "metrics.json").read_text())["image_noise"] == {}
    assert len((tmp_path / "per_class.csv").read_text().splitlines()) == 5
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    metric = measured()
    write_numbers(metric.compute(), tmp_path / "absent", metric, {})
    assert "warning: writing metrics.json failed" in capsys.readouterr().err


def test_an_epoch_is_one_line_with_losses_and_metrics(tmp_path, capsys):
    run = RunInfo(tmp_path, ("a",), ("box", "cls"), DETECT, epochs=60)
    columns = dict(zip(DETECT.columns, (0.6, 0.5, 0.4567, 0.3)))
    row = csv_row(0, {"box": 3.41234, "cls": 12.5}, SimpleNamespace(columns=columns, losses={}), [0.01])
    ConsoleLogger().on_epoch_end(run, row)
    assert capsys.readouterr().out == "      1/60  box 3.412  cls 12.5  P 0.600  R 0.500  mAP@0.5 0.457  mAP@0.5:0.95 0.300\n"
    ConsoleLogger().on_epoch_end(run, csv_row(1, {"box": 1.0, "cls": 2.0}, None, [0.01]))
    assert capsys.readouterr().out == "      2/60  box 1  cls 2\n"


def test_columns_of_masks_keep_their_letter():
    names = ("metrics/recall(M)", "metrics/mAP_0.5:0.95(B)", "metrics/AP75")
    assert [column_title(name) for name in names] == ["R(M)", "mAP@0.5:0.95(B)", "AP75"]


def test_rows_of_older_runs_count_from_1_after_a_resume(tmp_path):
    assert counted_from_1([{"epoch": 0, "a": 1}, {"epoch": 1}]) == [{"epoch": 1, "a": 1}, {"epoch": 2}]
    assert counted_from_1([{"epoch": 1}, {"epoch": 2}]) == [{"epoch": 1}, {"epoch": 2}]
    assert counted_from_1([]) == []
    for first in (0, 1):
        (tmp_path / "results.csv").write_text(f"epoch,a\n{first},1\n{first + 1},1\n")
        assert damage_of_table(tmp_path / "results.csv", rows=2) == ""
    (tmp_path / "results.csv").write_text("epoch,a\n2,1\n")
    assert "do not count from 1" in damage_of_table(tmp_path / "results.csv", rows=1)
