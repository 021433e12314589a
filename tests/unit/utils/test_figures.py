"""Figures for a paper: a PDF beside every PNG on request, complete legends, and panels that a spike does not flatten."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from utils.config import TrainConfig
from utils.errors import UserError
from utils.metrics.metrics import MetricAccumulator
from utils.visual.figures import COLOURS, PAGE, Style, figure_formats
from utils.visual.names import short_name
from utils.visual.plots import plot_confusion, plot_curves, plot_results, shown_range

EPOCHS, SPIKE_AT = 40, 17


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would have been written."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


def results_csv(path: Path, *, spike: float) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "train/box_loss", "metrics/precision", "val/box_loss"])
        for epoch in range(1, EPOCHS + 1):
            loss = spike if epoch == SPIKE_AT else 1 + 3 / epoch
            writer.writerow([epoch, loss, 1 - 1 / epoch, "" if epoch % 2 else 1 + 3 / epoch])
    return path


def legend_of(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_a_pdf_stands_beside_every_curve_and_matrix(tmp_path: Path) -> None:
    metric = MetricAccumulator(["行人", "b"])
    with figure_formats(["pdf"]):
        plot_curves(metric.compute(), tmp_path)
        plot_confusion(np.eye(3, dtype=int), ["行人", "b"], tmp_path / "confusion_matrix.png")
        plot_results(results_csv(tmp_path / "results.csv", spike=1.2), tmp_path / "results.png")
    names = {p.stem for p in tmp_path.glob("*.png")}
    assert names == {"PR_curve", "P_curve", "R_curve", "F1_curve", "confusion_matrix", "results"}
    assert {p.stem for p in tmp_path.glob("*.pdf")} == names
    assert b"/Type3" not in (tmp_path / "confusion_matrix.pdf").read_bytes()
    plot_confusion(np.eye(3, dtype=int), ["a", "b"], tmp_path / "after.png")
    assert not (tmp_path / "after.pdf").exists()


def test_a_spike_is_marked_and_does_not_flatten_its_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_results(results_csv(tmp_path / "a.csv", spike=5000.0), tmp_path / "a.png")
    plot_results(results_csv(tmp_path / "b.csv", spike=1.2), tmp_path / "b.png")
    with_spike, without = drawn
    assert legend_of(with_spike) == ["of each epoch", "smoothed over about 7 epochs", "outside the panel"]
    assert legend_of(without) == ["of each epoch", "smoothed over about 7 epochs"]
    high = with_spike.axes[0].get_ylim()[1]
    assert 3.9 < high < 5
    smoothed, marks = with_spike.axes[0].get_lines()[1:]
    assert np.max(smoothed.get_ydata()) < high
    assert marks.get_xdata().tolist() == [SPIKE_AT]
    assert with_spike.get_size_inches()[0] == PAGE


@pytest.mark.parametrize(("values", "clipped"), [
    (np.linspace(5, 1, 50), False), (1 + 3 / np.arange(1, 50), False), (np.r_[np.ones(30), 2.0], False), (np.r_[np.ones(5), 9.0], False),
    (np.r_[np.random.default_rng(0).normal(1, 0.1, 60), 1e6], True), (np.zeros(0), False),
])  # fmt: skip
def test_only_values_far_outside_are_left_out(values: np.ndarray, clipped: bool) -> None:
    low, high = shown_range(values)
    assert bool(((values < low) | (values > high)).any()) is clipped


def test_lines_differ_in_more_than_colour() -> None:
    styles = [Style.of(number) for number in range(3 * len(COLOURS))]
    assert len({(s.colour, str(s.dashes)) for s in styles}) == len(styles)


@pytest.mark.parametrize(("name", "expected"), [
    ("行人" * 30, "行人行人行…行人行人"), ("n" * 50, "n" * 10 + "…" + "n" * 9), ("行人", "行人"), ("a行" * 10, "a行a行a行a…a行a行a行"),
])  # fmt: skip
def test_wide_characters_count_twice(name: str, expected: str) -> None:
    assert short_name(name, most=20) == expected


def test_plots_and_noplots_exclude_one_another() -> None:
    assert TrainConfig(plots=("pdf",)).plots == ("pdf",)
    with pytest.raises(UserError, match="--plots with --noplots"):
        TrainConfig(plots=("pdf",), noplots=True)
    with pytest.raises(UserError, match="plots"):
        TrainConfig(plots=("svg",))
