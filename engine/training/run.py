"""A run: everything that one training works with, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from engine.logging.callbacks import Callbacks, RunInfo
from engine.logging.loggers import metric_columns
from engine.logging.progress import LossMeter
from engine.micro_batches import TrainingMicroBatches
from engine.training.early_stop import EarlyStop
from engine.training.ema import ModelEMA
from engine.training.initial_weights import FrozenLayers
from engine.training.nonfinite_guard import NonFiniteGuard
from engine.training.optim import load_state
from engine.training.schedule import Schedule
from engine.training.stop_signals import StopSignals
from models.checkpoints.checkpoint import Checkpoint, plugin_records
from models.heads.base import Loss
from models.model import Model
from utils import distributed
from utils.config import Hyperparameters, TrainConfig
from utils.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from data.loader import BatchLoader
    from utils.metrics.coco_eval import CocoAnnotations
    from utils.metrics.metrics import Metrics


@dataclass
class Run:
    """Everything that one training works with."""

    config: TrainConfig
    hyp: Hyperparameters
    device: torch.device
    save_dir: Path
    model: Model
    frozen: FrozenLayers
    network: nn.Module  # the model, compiled or distributed if so asked
    loss: Loss
    ema: ModelEMA
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    precision: torch.dtype | None
    schedule: Schedule
    train_loader: BatchLoader
    val_loader: BatchLoader
    early_stop: EarlyStop
    callbacks: Callbacks
    guard: NonFiniteGuard
    micro_batches: TrainingMicroBatches
    meter: LossMeter  # of the epoch that runs
    signals: StopSignals = field(default_factory=StopSignals)
    start_epoch: int = 0
    epoch: int = 0  # epochs done
    batch: int = 0  # batches of the next epoch that are done; their gradients are stepped
    rows: list[dict[str, Any]] = field(default_factory=list)  # of results.csv
    ranks: list[dict[str, Any]] = field(default_factory=list)  # what each of several processes has of its own, as agreed on last
    truth: CocoAnnotations | None = None  # of the validation images; None where label files have it
    class_ap: tuple[float, ...] | None = None  # as measured last, by which --image-weights draws images; None without it

    @property
    def info(self) -> RunInfo:
        return RunInfo(self.save_dir, self.model.names, self.loss.names, self.model.task, self.start_epoch, tuple(self.rows))

    def epochs_left(self) -> Sequence[int]:
        """None for a run that was stopped while it ended."""
        return () if self.early_stop.is_due(self.epoch - 1) else range(self.epoch, self.config.epochs)

    def end_epoch(self, row: Mapping[str, float], metrics: Metrics | None = None) -> None:
        """Counts the epoch as done."""
        self.epoch, self.batch = self.epoch + 1, 0
        if self.class_ap is not None and metrics is not None:
            measured = distributed.broadcast_object(metrics.ap.mean(axis=1).tolist())
            self.class_ap = tuple(cast("list[float]", measured))
        self.meter.reset()
        self.rows.append(dict(row))
        self.agree()

    def agree(self) -> None:
        """Tells the main process, which saves, what each process has of its own. Called by all of them at the same moment."""
        if distributed.is_distributed():
            meter = {name: value.cpu() for name, value in self.meter.state_dict().items()}
            self.ranks = distributed.gather_objects({"random": random_state(), "meter": meter})

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Validation leaves no trace in the training that goes on after it, nor in the one that is resumed from within it."""
        self.agree()
        random = random_state()
        with self.signals.at_once():
            try:
                yield
            finally:
                set_random_state(random)


def snapshot(run: Run, metrics: Metrics | None = None) -> Checkpoint:
    """The checkpoint of this moment; the tensors are shared with the run, not copied."""
    stop = run.early_stop
    return Checkpoint(
        cfg=run.model.spec.to_dict(),
        cfg_name=run.model.spec.origin,
        names=run.model.names,
        weights=run.ema.model.state_dict(),
        plugins=plugin_records(),
        hyp=run.hyp.to_dict(),
        config=run.config.to_dict(),
        epoch=run.epoch,
        fitness=float(metrics.fitness) if metrics else 0.0,
        best_fitness=stop.best_fitness,
        metrics=metric_columns(metrics),
        training={
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "ema_updates": run.ema.updates,
            "best_epoch": stop.best_epoch,
            "random": random_state(),
            "frozen": run.frozen.to_dict(),
            "loss": run.loss.state_dict(),
            "batch": run.batch,
            "iterations": len(run.train_loader),
            "images": len(run.train_loader.dataset),
            "meter": run.meter.state_dict(),
            "guard": run.guard.state_dict(),
            "portions": run.micro_batches.count,
            "rows": list(run.rows),
            "ranks": list(run.ranks),
            "class_ap": run.class_ap and list(run.class_ap),
        },
    )


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Puts a run back to where the checkpoint was written."""
    state = checkpoint.training
    assert state is not None
    load_state(run.optimizer, state["optimizer"])
    if state["scaler"]:  # empty where the run had none, as on a CPU
        run.scaler.load_state_dict(state["scaler"])
    run.ema.load_state_dict({"weights": checkpoint.weights, "updates": state["ema_updates"]})
    run.early_stop.best_fitness, run.early_stop.best_epoch = checkpoint.best_fitness, state["best_epoch"]
    run.loss.load_state_dict(state.get("loss", {}))
    run.start_epoch = run.epoch = checkpoint.epoch
    run.rows = [dict(row) for row in state.get("rows", ())]
    if run.class_ap is not None:
        run.class_ap = tuple(state["class_ap"])
    run.guard.load_state_dict(state.get("guard", {}))
    run.guard.keep_statistics()
    run.micro_batches.count = int(state.get("portions", 1))
    ranks = state.get("ranks") or [state]
    as_many = len(ranks) == distributed.world_size()
    own = ranks[distributed.rank()] if as_many else state
    if not as_many and distributed.is_main():
        before, now = len(ranks), distributed.world_size()
        print(f"warning: {before} process(es) then, {now} now: the run goes on, but not bit for bit", file=sys.stderr)
    if state.get("batch"):
        restore_position(run, {**state, "meter": own.get("meter", {})})
    if as_many or distributed.is_main():  # else seeded as in a new run
        set_random_state(own["random"])


def restore_position(run: Run, state: Mapping[str, Any]) -> None:
    """Goes on within the epoch, if the data are those that it began with."""
    here = (len(run.train_loader.dataset), len(run.train_loader))
    if here == (state["images"], state["iterations"]):
        run.batch = state["batch"]
        run.meter.load_state_dict(state["meter"], device=run.device)
    else:
        before, now = (f"{images} images in {iterations} batches" for images, iterations in ((state["images"], state["iterations"]), here))
        print(f"warning: the data have changed, {before} then, {now} now: epoch {run.epoch + 1} begins anew", file=sys.stderr)
