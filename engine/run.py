"""A run: everything that one training works with, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from engine.pretrained import Frozen
from models.checkpoints import Checkpoint, plugin_records
from models.detector import Detector
from models.heads.base import DetectionLoss
from utils.callbacks import Callbacks, RunInfo
from utils.config import Hyperparameters, TrainConfig
from utils.early_stop import EarlyStop
from utils.ema import ModelEMA
from utils.loggers import metric_columns
from utils.reproducibility import random_state, set_random_state
from utils.schedule import Schedule

if TYPE_CHECKING:
    from data.loader import DetectionLoader
    from utils.metrics import Metrics


@dataclass
class Run:
    """Everything that one training works with."""

    config: TrainConfig
    hyp: Hyperparameters
    device: torch.device
    save_dir: Path
    model: Detector
    frozen: Frozen
    network: nn.Module  # the model, compiled or distributed if so asked
    loss: DetectionLoss
    ema: ModelEMA
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    precision: torch.dtype | None
    schedule: Schedule
    train_loader: DetectionLoader
    val_loader: DetectionLoader
    early_stop: EarlyStop
    callbacks: Callbacks
    start_epoch: int = 0

    @property
    def info(self) -> RunInfo:
        return RunInfo(self.save_dir, self.model.names, self.loss.names, self.start_epoch)


def snapshot(run: Run, epochs_done: int, metrics: Metrics | None) -> Checkpoint:
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
        epoch=epochs_done,
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
        },
    )


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Puts a run back to where the checkpoint was written."""
    state = checkpoint.training
    assert state is not None
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.ema.load_state_dict({"weights": checkpoint.weights, "updates": state["ema_updates"]})
    run.early_stop.best_fitness, run.early_stop.best_epoch = checkpoint.best_fitness, state["best_epoch"]
    run.loss.load_state_dict(state.get("loss", {}))
    run.start_epoch = checkpoint.epoch
    set_random_state(state["random"])
