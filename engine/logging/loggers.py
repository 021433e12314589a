"""The loggers of every run: results.csv, TensorBoard events and plots."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from numpy.typing import NDArray

from engine.logging.callbacks import Callback, RunInfo
from engine.logging.observing import observing
from utils.metrics.columns import column_title
from utils.types import Batch

if TYPE_CHECKING:
    from tasks.base import MetricResult

LEARNING_RATES = ("x/lr0", "x/lr1", "x/lr2")


def columns(parts: Sequence[str], metric_names: Sequence[str]) -> tuple[str, ...]:
    """The columns of results.csv for these loss parts and metrics, in the order that scripts of YOLO users expect."""
    return ("epoch", *(f"train/{p}_loss" for p in parts), *metric_names, *(f"val/{p}_loss" for p in parts), *LEARNING_RATES)


def csv_row(epoch: int, losses: Mapping[str, float], metrics: MetricResult | None, rates: Sequence[float]) -> dict[str, float]:
    """The row of an epoch: mean training losses, metrics if there was a validation, and the learning rate of each group.

    Args:
        epoch: counted from 0; in results.csv, on the console and in plots the first one is 1.
    """
    trained = {f"train/{name}_loss": value for name, value in losses.items()}
    return {"epoch": epoch + 1, **trained, **metric_columns(metrics), **dict(zip(LEARNING_RATES, rates))}


def metric_columns(metrics: MetricResult | None) -> dict[str, float]:
    """Metrics and validation losses by their names in results.csv; empty without a validation."""
    if metrics is None:
        return {}
    return {**metrics.columns, **{f"val/{name}_loss": float(value) for name, value in metrics.losses.items()}}


class CsvLogger(Callback):
    """Appends one row per epoch to results.csv; a value that was not measured is left empty.

    A resumed run writes the file again from the rows of its checkpoint, so that no row is missing, torn or written twice.
    """

    def on_train_start(self, run: RunInfo) -> None:
        with open(run.save_dir / "results.csv", "w", newline="", encoding="utf-8") as file:
            writer = _csv_writer(file, run)
            writer.writeheader()
            writer.writerows(map(_format_row, run.rows))

    def on_epoch_end(self, run: RunInfo, row: Mapping[str, float]) -> None:
        with open(run.save_dir / "results.csv", "a", newline="", encoding="utf-8") as file:
            _csv_writer(file, run).writerow(_format_row(row))


class ConsoleLogger(Callback):
    """Prints a line for each epoch: mean training losses and what validation found."""

    def on_epoch_end(self, run: RunInfo, row: Mapping[str, float]) -> None:
        print(epoch_line(run, row))


def epoch_line(run: RunInfo, row: Mapping[str, float]) -> str:
    """``1/60  box 3.41  cls 4.12  dfl 2.91  P 0.012  R 0.210  mAP@0.5 0.034  mAP@0.5:0.95 0.011``, below the columns of the bar."""
    place = f"{row['epoch']}/{run.epochs}" if run.epochs else str(row["epoch"])
    losses = [f"{part} {row[key]:.4g}" for part in run.parts if (key := f"train/{part}_loss") in row]
    metrics = [f"{column_title(name)} {row[name]:.3f}" for name in run.task.columns if name in row]
    return "  ".join((f"{place:>10}", *losses, *metrics))


class TensorBoardLogger(Callback):
    """Writes every column of results.csv as a scalar."""

    def __init__(self) -> None:
        self.writer: Any = None

    def on_train_start(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        last = run.rows[-1:]  # of a resumed run, which may have been stopped before it was written
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
    """Plots the labels, the first training batches, and at the end the curves; a figure that fails is one line, the others are made.

    Args:
        labels: of every training image, (n, 5) [class, cx, cy, w, h] normalised.
        whole_images: boxes are those of whole images, so that only the classes are plotted.
    """

    BATCHES = 3

    def __init__(self, labels: Sequence[NDArray], *, whole_images: bool = False) -> None:
        self.labels, self.whole_images = labels, whole_images

    def on_train_start(self, run: RunInfo) -> None:
        with observing("plotting labels.jpg"):
            from utils.visual.plots import plot_class_counts, plot_labels

            (plot_class_counts if self.whole_images else plot_labels)(self.labels, run.names, run.save_dir / "labels.jpg")

    def on_batch(self, run: RunInfo, epoch: int, iteration: int, batch: Batch) -> None:
        if epoch == run.start_epoch and iteration < self.BATCHES:
            with observing(f"drawing train_batch{iteration}.jpg"):
                from engine.logging.batch_images import save_batch_image

                save_batch_image(run.save_dir / f"train_batch{iteration}.jpg", batch, run.task, run.names)

    def on_train_end(self, run: RunInfo) -> None:
        with observing("plotting results.png"):
            from utils.visual.plots import plot_results

            plot_results(run.save_dir / "results.csv", run.save_dir / "results.png")


def _csv_writer(file: TextIO, run: RunInfo) -> csv.DictWriter:
    return csv.DictWriter(file, columns(run.parts, run.task.columns), extrasaction="ignore", restval="")


def _format_row(row: Mapping[str, float]) -> dict[str, Any]:
    return {k: v if k == "epoch" else f"{v:.6g}" for k, v in row.items()}
