"""Learning rate, momentum and accumulation of every iteration: a pure function of (epoch, iteration), so that a resume is exact.

The rules are those of the YOLO family: linear warm-up in iterations, then one factor an epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from utils.config import Hyperparameters, TrainConfig
from utils.errors import UserError

KINDS = ("linear", "cosine", "flat-cosine", "fixed")


class StepSettings(NamedTuple):
    """The settings of one iteration."""

    lr_bias: float
    lr: float  # of every other group
    momentum: float
    accumulate: int  # iterations whose gradients are summed before a step


@dataclass(frozen=True)
class Schedule:
    """The schedule of one run.

    ``batch_size`` is the batch over all processes; ``accumulate`` overrides nominal batch / batch size.
    """

    hyp: Hyperparameters
    kind: str
    epochs: int
    iterations: int  # per epoch
    batch_size: int
    accumulate: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"schedule {self.kind!r} is unknown, one of {', '.join(KINDS)} is needed")

    def at(self, epoch: int, iteration: int) -> StepSettings:
        """The settings of iteration ``iteration`` (from 0) of epoch ``epoch`` (from 0)."""
        hyp, warmup = self.hyp, self.warmup_iterations
        lr = hyp.lr0 * self.factor(epoch)
        done = epoch * self.iterations + iteration
        if done >= warmup:
            return StepSettings(lr, lr, hyp.momentum, self.full_accumulate)
        part = done / warmup
        return StepSettings(
            lr_bias=_between(hyp.warmup_bias_lr, lr, part),
            lr=lr * part,
            momentum=_between(hyp.warmup_momentum, hyp.momentum, part),
            accumulate=max(1, round(_between(1, self._exact_accumulate, part))),
        )

    def factor(self, epoch: int) -> float:
        """lr / lr0 of an epoch after warm-up."""
        lrf = self.hyp.lrf
        if self.kind == "fixed":
            return 1.0
        if self.kind == "cosine":
            return _cosine(epoch / self.epochs, lrf)
        if self.kind == "flat-cosine":
            half = max(self.epochs // 2, 1)
            return 1.0 if epoch < half else _cosine((epoch - half) / half, lrf)
        last = max(self.epochs - 1, 1) if self.hyp.lr_reaches_lrf else self.epochs
        return (1 - epoch / last) * (1 - lrf) + lrf

    @property
    def warmup_iterations(self) -> int:
        """At least ``warmup_min_iters``, at most the whole training; with no minimum (v8) it ends one epoch before the training.
        ``warmup_epochs: 0`` means none."""
        if not self.hyp.warmup_epochs:
            return 0
        if not self.hyp.warmup_min_iters:
            return round(min(self.hyp.warmup_epochs, self.epochs - 1) * self.iterations)
        wanted = max(round(self.hyp.warmup_epochs * self.iterations), self.hyp.warmup_min_iters)
        return min(wanted, self.epochs * self.iterations)

    @property
    def full_accumulate(self) -> int:
        """Accumulation after warm-up."""
        return max(1, round(self._exact_accumulate))

    @property
    def effective_batch(self) -> int:
        return self.batch_size * self.full_accumulate

    @property
    def _exact_accumulate(self) -> float:
        return self.accumulate or self.hyp.nbs / self.batch_size


def build_schedule(config: TrainConfig, hyp: Hyperparameters, *, batches: int) -> Schedule:
    """Learning rate, momentum and accumulation for epochs of so many batches."""
    return Schedule(hyp, config.schedule, config.epochs, batches, config.batch_size, config.accumulate)


def _between(first: float, last: float, part: float) -> float:
    return first + (last - first) * part


def _cosine(part: float, last: float) -> float:
    """Half a cosine from 1 to ``last``, ``part`` in 0-1."""
    return (1 - math.cos(math.pi * part)) / 2 * (last - 1) + 1
