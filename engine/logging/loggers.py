"""What a run leaves besides weights: results.csv, TensorBoard events and images."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from engine.logging.callbacks import Callback, RunInfo
from utils.types import Batch

if TYPE_CHECKING:
    from tasks.base import MetricResult

LEARNING_RATES = ("x/lr0", "x/lr1", "x/lr2")


def columns(parts: tuple[str, ...], metrics: tuple[str, ...]) -> tuple[str, ...]:
    """The columns of results.csv for these loss parts and metric columns, in the order that YOLO users' scripts expect."""
    return ("epoch", *(f"train/{p}_loss" for p in parts), *metrics, *(f"val/{p}_loss" for p in parts), *LEARNING_RATES)


def csv_row(epoch: int, losses: Mapping[str, float], metrics: MetricResult | None, rates: Sequence[float]) -> dict[str, float]:
    """The row of an epoch: mean training losses, metrics where they were measured, and the learning rate of each group."""
    trained = {f"train/{name}_loss": value for name, value in losses.items()}
    return {"epoch": epoch, **trained, **metric_columns(metrics), **dict(zip(LEARNING_RATES, rates))}


def metric_columns(metrics: MetricResult | None) -> dict[str, float]:
    """Metrics and validation losses under their names in results.csv."""
    if metrics is None:
        return {}
    return {**metrics.columns, **{f"val/{name}_loss": float(value) for name, value in metrics.losses.items()}}


class CsvLogger(Callback):
    """Appends one row an epoch to results.csv; a value that was not measured is left empty.

    A resumed run brings its rows along, so that none is missing, torn or there twice, whenever it was stopped.
    """

    def on_train_start(self, run: RunInfo) -> None:
        with open(run.save_dir / "results.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns(run.parts, run.task.columns), extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(map(_formatted, run.rows))

    def on_epoch_end(self, run: RunInfo, row: Mapping[str, float]) -> None:
        with open(run.save_dir / "results.csv", "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns(run.parts, run.task.columns), extrasaction="ignore", restval="")
            writer.writerow(_formatted(row))


class TensorBoardLogger(Callback):
    """Writes every column of results.csv as a scalar."""

    def __init__(self) -> None:
        self.writer: Any = None

    def on_train_start(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        last = run.rows[-1:]  # of a resumed run; it may have been stopped before that was written
        self.writer = SummaryWriter(str(run.save_dir), purge_step=int(last[0]["epoch"]) if last else None)
        for row in last:
            self.on_epoch_end(run, row)

    def on_epoch_end(self, run: RunInfo, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, int(row["epoch"]))

    def on_train_end(self, run: RunInfo) -> None:
        self.writer.close()


class PlotLogger(Callback):
    """Images of the labels, of the first batches, and of the curves at the end.

    Args:
        labels: of every training image, (n, 5) [class, cx, cy, w, h] normalised.
    """

    BATCHES = 3

    def __init__(self, labels: Sequence[NDArray]) -> None:
        self.labels = labels

    def on_train_start(self, run: RunInfo) -> None:
        from utils.visual.plots import plot_labels

        plot_labels(self.labels, run.names, run.save_dir / "labels.jpg")

    def on_batch(self, run: RunInfo, epoch: int, iteration: int, batch: Batch) -> None:
        if epoch == run.start_epoch and iteration < self.BATCHES:
            from engine.logging.batch_images import save_batch_image

            save_batch_image(run.save_dir / f"train_batch{iteration}.jpg", batch, run.task, run.names)

    def on_train_end(self, run: RunInfo) -> None:
        from utils.visual.plots import plot_results

        plot_results(run.save_dir / "results.csv", run.save_dir / "results.png")


def _formatted(row: Mapping[str, float]) -> dict[str, Any]:
    return {k: v if k == "epoch" else f"{v:.6g}" for k, v in row.items()}
