"""One training iteration: forward, loss, backward, and the optimizer step once the gradients of enough batches are summed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from data.augment.on_device import finished
from engine.micro_batches import Pass, TrainingMicroBatches
from engine.training.ema import ModelEMA
from engine.training.initial_weights import FrozenLayers
from engine.training.multi_scale import rescale
from engine.training.nonfinite_guard import NonFiniteGuard
from engine.training.optim import apply_settings, optimizer_step
from engine.training.schedule import Schedule
from models.heads.base import Loss
from models.model import Model
from utils import distributed
from utils.config import TrainConfig
from utils.precision import autocast
from utils.types import Batch, to_unit_range


@dataclass
class TrainingState:
    """What optimizer steps change, and what they need for it."""

    model: Model
    network: nn.Module  # the model as it is called in training: compiled or distributed if so configured
    frozen: FrozenLayers
    loss: Loss
    ema: ModelEMA[Model]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler

    def set_training_mode(self) -> None:
        """Puts the network into training mode, except frozen rows, whose running statistics stay as they are too."""
        self.network.train()
        for index in self.frozen.rows:
            self.model.model[index].eval()


@dataclass
class TrainingStep:
    """Forward, loss, backward and optimizer step of a run.

    Attributes:
        clip_norm: the largest norm of a gradient; 0 does not clip.
        precision: of the forward pass, None for float32.
        is_due: whether the iteration ends with an optimizer step.
    """

    state: TrainingState
    schedule: Schedule
    guard: NonFiniteGuard
    config: TrainConfig
    clip_norm: float
    device: torch.device
    precision: torch.dtype | None
    micro_batches: TrainingMicroBatches = field(init=False)
    epoch: int = 0
    iteration: int = 0
    is_due: bool = False
    _summed: int = 0  # batches whose gradients no step has used yet

    def __post_init__(self) -> None:
        self.micro_batches = TrainingMicroBatches(self.state.model, self.state.loss, self.guard, self.device)

    def begin(self, epoch: int, iteration: int, *, is_last: bool) -> None:
        """Sets learning rate, momentum and the loss's schedule of an iteration, and decides whether it ends with an optimizer step.

        Args:
            is_last: of the epoch; its step uses all gradients that are left, so that none are carried into the next epoch.
        """
        self.epoch, self.iteration = epoch, iteration
        settings = self.schedule.at(epoch, iteration)
        apply_settings(self.state.optimizer, settings)
        self.state.loss.begin_epoch(epoch, self.config.epochs)
        self._summed += 1
        self.is_due = self._summed >= settings.accumulate or is_last

    def backward(self, batch: Batch) -> Pass:
        """Adds the gradients of a batch (on the host) to the summed ones, in micro-batches if memory requires it.

        Raises:
            UserError: the memory is full with a single image.
        """
        place = f"epoch {self.epoch + 1}, iteration {self.iteration + 1}"
        with distributed.gradient_sync(self.state.network, now=self.is_due):
            return self.micro_batches.run(batch, self.forward_backward, place=place)

    def forward_backward(self, batch: Batch) -> Pass:
        """One pass over a batch or a micro-batch."""
        state, config = self.state, self.config
        batch = finished(batch.to(self.device))
        images = to_unit_range(batch.images, self.precision or torch.float32)  # (B, C, H, W) in 0-1, in the type that the network reads
        if config.multi_scale:
            key = (config.seed, self.epoch, self.iteration)
            images = rescale(images, base_px=config.imgsz, stride=state.model.stride, key=key)
        with autocast(self.device, self.precision):
            targets = state.model.head.targets_of(batch)
            output = state.network(images) if targets is None else state.network(images, targets)
        parts = state.loss(output, batch)
        total = self.guard.total_loss(parts, epoch=self.epoch, iteration=self.iteration, paths=batch.paths)
        times = 1 if state.model.head.mean_loss else batch.images_of_step
        state.scaler.scale(total * times).backward()
        return Pass(parts, images.shape[-1])

    def update_weights(self) -> None:
        """Steps with the summed gradients and updates the moving average; non-finite gradients change nothing."""
        state, self._summed = self.state, 0
        non_finite = self.guard.has_non_finite_loss()
        applied = optimizer_step(state.optimizer, state.scaler, clip_norm=self.clip_norm, non_finite=non_finite)
        self.guard.after_step(applied, non_finite)
        state.ema.update(applied)
