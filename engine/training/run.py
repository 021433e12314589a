"""A run: everything that one training works with, and how its state goes into a checkpoint and is restored from it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.logging.callbacks import Callbacks, RunInfo
from engine.logging.loggers import metric_columns
from engine.logging.progress import LossMeter
from engine.precise_batch_norm import FirstBatches
from engine.training.early_stop import EarlyStop
from engine.training.optim import load_state
from engine.training.step import TrainingState, TrainingStep
from engine.training.stop_signals import StopSignals
from models.checkpoints.checkpoint import Checkpoint, plugin_records
from utils import distributed
from utils.config import Hyperparameters, TrainConfig
from utils.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from data.loader import BatchLoader
    from models.model import Model
    from tasks.base import MetricResult
    from utils.metrics.coco_eval import CocoAnnotations


@dataclass
class Loaders:
    """Batches of both splits, and the ground truth of the validation images where label files do not hold it.

    Attributes:
        origin: the absolute path of the data set's YAML (``file``), and the hash of the labels of ``train`` and ``val``.
    """

    train: BatchLoader
    val: BatchLoader
    annotations: CocoAnnotations | None = None
    origin: dict[str, str] = field(default_factory=dict)


@dataclass
class Progress:
    """How far a run is, and what its epochs resulted in."""

    early_stop: EarlyStop
    start_epoch: int = 0  # above 0 after a resume
    epoch: int = 0  # epochs done
    batch: int = 0  # batches of the next epoch that are done; optimizer steps have used their gradients
    rows: list[dict[str, Any]] = field(default_factory=list)  # of results.csv
    class_ap: tuple[float, ...] | None = None  # of the last validation, which --image-weights samples by; None without it
    rank_states: list[dict[str, Any]] = field(default_factory=list)  # random state and loss sums of each rank, as gathered last

    def epochs_left(self, epochs: int) -> Sequence[int]:
        """Epochs to train; none for a run that was stopped after its last epoch."""
        return () if self.early_stop.is_due(self.epoch - 1) else range(self.epoch, epochs)


@dataclass
class Run:
    """Everything that one training works with."""

    config: TrainConfig
    hyp: Hyperparameters
    device: torch.device
    save_dir: Path
    loaders: Loaders
    state: TrainingState
    step: TrainingStep
    progress: Progress
    meter: LossMeter  # of the current epoch
    callbacks: Callbacks
    first_batches: FirstBatches  # of the epoch, for --precise-bn
    signals: StopSignals = field(default_factory=StopSignals)

    @property
    def info(self) -> RunInfo:
        """What callbacks get."""
        progress, state = self.progress, self.state
        return RunInfo(
            self.save_dir, state.model.names, state.loss.names, state.model.task, progress.start_epoch, tuple(progress.rows),
            self.config.epochs,
        )  # fmt: skip

    def end_epoch(self, row: Mapping[str, float], metrics: MetricResult | None = None) -> None:
        """Counts the epoch as done."""
        progress = self.progress
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if progress.class_ap is not None and metrics is not None:
            progress.class_ap = tuple(distributed.broadcast_object(list(metrics.class_ap)))
        self.meter.reset()
        progress.rows.append(dict(row))
        self.gather_rank_states()

    def gather_rank_states(self) -> None:
        """Gathers for the next checkpoint what differs between ranks. A collective: all ranks call it at the same point."""
        if distributed.is_distributed():
            meter = {name: value.cpu() for name, value in self.meter.state_dict().items()}
            self.progress.rank_states = distributed.gather_objects({"random": random_state(), "meter": meter})

    @contextmanager
    def isolated_validation(self) -> Iterator[None]:
        """Restores the random state after a validation, so that neither this training nor one resumed from within it depends on it."""
        self.gather_rank_states()
        random = random_state()
        with self.signals.at_once():
            try:
                yield
            finally:
                set_random_state(random)


def context_of(run: Run, weights: Path, model: Model) -> dict[str, Any]:
    """What metrics.json says of the validation of a network with these weights."""
    config = run.config
    files = {"weights": str(weights), "data": config.data, "split": "val", "seed": config.seed}
    parameters = sum(p.numel() for p in model.parameters())
    return {**files, "imgsz": config.val_imgsz or config.imgsz, "batch_size": config.batch_size, "parameters": parameters}


def snapshot(run: Run, metrics: MetricResult | None = None) -> Checkpoint:
    """The checkpoint of this moment; its tensors are the run's own, not copies."""
    state, progress, loader = run.state, run.progress, run.loaders.train
    return Checkpoint(
        cfg=state.model.spec.to_dict(),
        cfg_name=state.model.spec.origin,
        names=state.model.names,
        weights=state.ema.model.state_dict(),
        plugins=plugin_records(),
        hyp=run.hyp.to_dict(),
        config=run.config.to_dict(),
        epoch=progress.epoch,
        fitness=float(metrics.fitness) if metrics else 0.0,
        best_fitness=progress.early_stop.best_fitness,
        metrics=metric_columns(metrics),
        training={
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "ema_updates": state.ema.updates,
            "best_epoch": progress.early_stop.best_epoch,
            "random": random_state(),
            "frozen": state.frozen.to_dict(),
            "loss": state.loss.state_dict(),
            "batch": progress.batch,
            "iterations": len(loader),
            "images": len(loader.dataset),
            "data": dict(run.loaders.origin),
            "meter": run.meter.state_dict(),
            "guard": run.step.guard.state_dict(),
            "portions": run.step.micro_batches.count,  # the key of format version 1
            "rows": list(progress.rows),
            "ranks": list(progress.rank_states),
            "class_ap": progress.class_ap and list(progress.class_ap),
        },
    )


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Restores the state that a checkpoint was written in."""
    saved = checkpoint.training
    assert saved is not None
    restore_training_state(run, checkpoint, saved)
    restore_progress(run.progress, checkpoint, saved)
    ranks = saved.get("ranks") or [saved]
    same_world_size = len(ranks) == distributed.world_size()
    own = ranks[distributed.rank()] if same_world_size else saved
    if not same_world_size and distributed.is_main():
        before, now = len(ranks), distributed.world_size()
        print(f"warning: saved by {before} process(es), resumed by {now}: the run is not continued bit for bit", file=sys.stderr)
    if saved.get("batch"):
        restore_position(run, {**saved, "meter": own.get("meter", {})})
    if same_world_size or distributed.is_main():  # other ranks are seeded as in a new run
        set_random_state(own["random"])


def restore_training_state(run: Run, checkpoint: Checkpoint, saved: Mapping[str, Any]) -> None:
    """Restores optimizer, gradient scaler, moving average, loss, non-finite guard and the number of micro-batches."""
    state, guard = run.state, run.step.guard
    load_state(state.optimizer, saved["optimizer"])
    if saved["scaler"]:  # empty where the run had none, as on a CPU
        state.scaler.load_state_dict(saved["scaler"])
    state.ema.load_state_dict({"weights": checkpoint.weights, "updates": saved["ema_updates"]})
    state.loss.load_state_dict(saved.get("loss", {}))
    guard.load_state_dict(saved.get("guard", {}))
    guard.save_statistics()
    run.step.micro_batches.count = int(saved.get("portions", 1))


def restore_progress(progress: Progress, checkpoint: Checkpoint, saved: Mapping[str, Any]) -> None:
    """Restores the epochs that are done and their results."""
    progress.early_stop.best_fitness, progress.early_stop.best_epoch = checkpoint.best_fitness, saved["best_epoch"]
    progress.start_epoch = progress.epoch = checkpoint.epoch
    progress.rows = counted_from_1([dict(row) for row in saved.get("rows", ())])
    if progress.class_ap is not None:
        progress.class_ap = tuple(saved["class_ap"])


def counted_from_1(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of results.csv with epochs from 1; older runs counted them from 0."""
    shift = 1 if rows and rows[0].get("epoch") == 0 else 0
    return [{**row, "epoch": row["epoch"] + shift} for row in rows]


def restore_position(run: Run, saved: Mapping[str, Any]) -> None:
    """Restores the position within the epoch, if the data set is the one that the epoch began with."""
    current = (len(run.loaders.train.dataset), len(run.loaders.train))
    if current == (saved["images"], saved["iterations"]):
        run.progress.batch = saved["batch"]
        run.meter.load_state_dict(saved["meter"], device=run.device)
    else:
        before, now = (f"{images} images in {batches} batches" for images, batches in ((saved["images"], saved["iterations"]), current))
        reason = f"the data have changed, {before} then, {now} now"
        print(f"warning: {reason}: epoch {run.progress.epoch + 1} starts from its first batch", file=sys.stderr)
