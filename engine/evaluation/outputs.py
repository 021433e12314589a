"""The numbers of an evaluation as files in its run folder: metrics.json, per_class.csv and pr_curve.csv."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from engine.logging.observing import observing
from tasks.base import Metric, MetricResult
from utils.files import atomic_write
from utils.metrics.metrics import MetricAccumulator
from utils.metrics.resampling import image_noise
from utils.text_table import csv_cell

FORMAT_VERSION = 1
DIGITS = 6


@runtime_checkable
class DetailedResult(Protocol):
    """A :class:`MetricResult` that also has values by class and a curve."""

    @property
    def details(self) -> Mapping[str, Any]:
        """Further entries of metrics.json."""

    @property
    def class_rows(self) -> Sequence[Mapping[str, Any]]:
        """Rows of per_class.csv, the mean first; all have the same keys."""

    @property
    def pr_curve(self) -> Mapping[str, NDArray[np.float64]]:
        """Columns of pr_curve.csv, the recalls first."""


def write_numbers(metrics: MetricResult, folder: Path, metric: Metric, context: Mapping[str, Any]) -> None:
    """Writes the files; what cannot be written is a line, and the evaluation's result stands.

    Args:
        metrics: what was found.
        folder: run folder.
        metric: holds what was collected; the noise of the evaluation is estimated from it.
        context: what was evaluated how: weights, data, split, imgsz, batch_size, parameters.
    """
    with observing("writing metrics.json"):
        noise = image_noise(metric) if isinstance(metric, MetricAccumulator) else {}
        _write_text(folder / "metrics.json", json.dumps(metrics_file(metrics, noise, context), indent=2, ensure_ascii=False) + "\n")
    if isinstance(metrics, DetailedResult):
        with observing("writing per_class.csv and pr_curve.csv"):
            rows, curve = metrics.class_rows, metrics.pr_curve
            _write_table(folder / "per_class.csv", list(rows[0]), (row.values() for row in rows))
            _write_table(folder / "pr_curve.csv", list(curve), zip(*curve.values()))


def metrics_file(metrics: MetricResult, noise: Mapping[str, float], context: Mapping[str, Any]) -> dict[str, Any]:
    """The content of metrics.json; null for what was not measured."""
    found = {
        "format_version": FORMAT_VERSION,
        **context,
        "metrics": dict(metrics.columns),
        "fitness": metrics.fitness,
        **(metrics.details if isinstance(metrics, DetailedResult) else {}),
        "image_noise": dict(noise),
        "losses": dict(metrics.losses),
        "speed_ms": dict(metrics.speed_ms),
    }
    return {key: _plain(value) for key, value in found.items()}


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor numbers of numpy."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (float, np.floating)):
        return round(float(value), DIGITS) if math.isfinite(value) else None
    return value


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([csv_cell(name) for name in header])
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return f"{value:.{DIGITS}g}" if math.isfinite(value) else ""
    return csv_cell(value)


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
