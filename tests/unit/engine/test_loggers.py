"""results.csv has the columns that scripts expect, and a resume continues it."""

from __future__ import annotations

import csv

from engine.logging.callbacks import RunInfo
from engine.logging.loggers import CsvLogger, TensorBoardLogger, columns
from tasks import DETECT

PARTS = ("box", "cls", "dfl")


def rows_of(path):
    with open(path / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_columns_match_published_names():
    assert columns(PARTS, DETECT.columns) == (
        *("epoch", "train/box_loss", "train/cls_loss", "train/dfl_loss"),
        *("metrics/precision", "metrics/recall", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95"),
        *("val/box_loss", "val/cls_loss", "val/dfl_loss", "x/lr0", "x/lr1", "x/lr2"),
    )


def test_resumed_run_rewrites_its_previous_rows(tmp_path):
    logger, rows = CsvLogger(), []
    logger.on_train_start(RunInfo(tmp_path, ("a",), PARTS, DETECT))
    for epoch in range(3):
        rows.append({"epoch": epoch, "train/box_loss": 1 / 3, "x/lr0": 0.01})
        logger.on_epoch_end(RunInfo(tmp_path, ("a",), PARTS, DETECT), rows[-1])
    with open(tmp_path / "results.csv", "a") as file:
        file.write("3,0.12")  # torn
    resumed = RunInfo(tmp_path, ("a",), PARTS, DETECT, start_epoch=2, rows=tuple(rows[:2]))
    logger.on_train_start(resumed)
    logger.on_epoch_end(resumed, {"epoch": 2, "train/box_loss": 0.5})
    rows = rows_of(tmp_path)
    assert [r["epoch"] for r in rows] == ["0", "1", "2"]
    assert [r["train/box_loss"] for r in rows] == ["0.333333", "0.333333", "0.5"]
    assert rows[0]["metrics/precision"] == ""


def test_tensorboard_writes_events(tmp_path):
    logger = TensorBoardLogger()
    run = RunInfo(tmp_path, ("a",), PARTS, DETECT)
    logger.on_train_start(run)
    logger.on_epoch_end(run, {"epoch": 0, "x/lr0": 0.01})
    logger.on_train_end(run)
    assert list(tmp_path.glob("events.out.tfevents.*"))
