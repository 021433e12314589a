"""Plots stop no run: names that mean something to matplotlib are shown as they are, and what fails is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import val
from engine.evaluation.callbacks import EvaluatedBatch, ImageSaver
from engine.logging.observing import observing
from tasks.detect import DetectTask
from tests.tiny_training import config, make_world
from train import train
from utils.cli.val_arguments import ValConfig
from utils.errors import UserError
from utils.metrics.metrics import GroundTruth, MetricAccumulator
from utils.types import Detections
from utils.visual.names import shown_name
from utils.visual.plots import plot_confusion, plot_curves, plot_labels, plot_trade_off

NAMES = ("US$5-US$10", "_a$x^{$ b", "$$", "$10\\$20", "a\nb\x00\x1b[31m", "翘头剪/左", "l" * 500, "x\ud800", "\\", "", "^_{}")


def test_figures_take_any_class_name(tmp_path: Path) -> None:
    metric = MetricAccumulator(NAMES)
    for c in range(len(NAMES)):
        found = Detections(torch.tensor([[1.0, 1.0, 9.0, 9.0]]), torch.tensor([0.9]), torch.tensor([c]))
        metric.update([found], GroundTruth.of_boxes(torch.tensor([0]), torch.tensor([c]), torch.tensor([[1.0, 1.0, 8.0, 8.0]])), images=[c])
    plot_curves(metric.compute(), tmp_path)
    plot_confusion(np.eye(len(NAMES) + 1, dtype=int), NAMES, tmp_path / "confusion.png")
    plot_labels([np.array([[0, 0.5, 0.5, 0.1, 0.1]])], NAMES, tmp_path / "labels.png")
    plot_trade_off({name: [(1.0, 2.0, name)] for name in NAMES}, tmp_path / "trade_off.png", x="ms", y="mAP")
    assert len(list(tmp_path.glob("*.png"))) == 7


@pytest.mark.parametrize(
    ("name", "expected"), [("cat", "cat"), ("$a$", r"\$a\$"), ("a\nb", "a�b"), ("x\ud800", "x�"), ("n" * 50, "n" * 20 + "…" + "n" * 19)]
)
def test_names_as_matplotlib_shows_them(name: str, expected: str) -> None:
    assert shown_name(name) == expected


def test_legend_names_classes_that_begin_with_an_underscore(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    shown: list[list[str]] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: shown.append([t.get_text() for t in self.legends[0].texts]))
    plot_trade_off({"_a": [(1.0, 2.0, "x")], "b": [(1.0, 3.0, "x")]}, tmp_path / "x.png", x="ms", y="mAP")
    assert shown == [["_a", "b"]]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ValueError("two\nlines"), "ValueError: two lines"), (UserError("disk is full"), "disk is full"), (MemoryError(), "MemoryError:")],
)
def test_a_failure_is_one_line(error: Exception, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with observing("plotting"):
        raise error
    line = capsys.readouterr().err
    assert line.startswith(f"warning: plotting failed ({expected}")
    assert line.count("\n") == 1
    with pytest.raises(KeyboardInterrupt), observing("plotting"):
        raise KeyboardInterrupt


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("no such font")


def test_a_run_ends_with_all_weights_though_no_figure_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path / "world")
    monkeypatch.setattr(DetectTask, "plot", fail)
    monkeypatch.setattr(DetectTask, "draw", fail)
    monkeypatch.setattr("utils.visual.plots.plot_labels", fail)
    result = train(config(world, tmp_path / "runs", epochs=1, noplots=False, plots=("pdf",)))
    assert result.deployed_weights.is_file()
    assert {p.name for p in result.save_dir.glob("results.p*")} == {"results.png", "results.pdf"}
    found = val.validate(
        ValConfig(weights=str(result.best_weights), imgsz=64, batch_size=4, workers=0, device="cpu", project=str(tmp_path / "val"))
    )
    assert found.images == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if "no such font" in line]
    assert sum("plotting curves and confusion matrix failed (RuntimeError: no such font)" in line for line in lines) == 2
    assert sum("drawing val_batch0 failed" in line for line in lines) == 2
    assert sum("plotting labels.jpg failed" in line for line in lines) == 1


def test_drawing_a_batch_raises_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken: Callable[..., EvaluatedBatch] = lambda **fields: SimpleNamespace(number=0, batch=None, detections_in_batch=[], **fields)  # noqa: E731
    ImageSaver(tmp_path, NAMES, DetectTask()).on_batch(broken())
    assert "drawing val_batch0 failed" in capsys.readouterr().err
