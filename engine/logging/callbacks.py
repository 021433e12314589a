"""Observers of a training run. They are told what happened, on the main process only, and can change nothing.

An observer that fails is dropped with one line; the run goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks import Task
from utils.types import Batch


@dataclass(frozen=True)
class RunInfo:
    """What observers know of a run."""

    save_dir: Path
    names: tuple[str, ...]  # classes
    parts: tuple[str, ...]  # of the loss
    task: Task
    start_epoch: int = 0  # above 0 after a resume
    rows: tuple[Mapping[str, float], ...] = ()  # of results.csv, of all epochs that are done


class Callback:
    """Every method may be left as it is."""

    def on_train_start(self, run: RunInfo) -> None:
        """Once, before the first epoch."""

    def on_batch(self, run: RunInfo, epoch: int, iteration: int, batch: Batch) -> None:
        """After each training step; ``batch`` is what the network saw, possibly on another device."""

    def on_epoch_end(self, run: RunInfo, row: Mapping[str, float]) -> None:
        """After validation and saving, with the row of results.csv."""

    def on_train_end(self, run: RunInfo) -> None:
        """Once, also after an early stop."""


class Callbacks(Callback):
    """Tells each observer in turn; empty on all processes but the main one."""

    def __init__(self, observers: Sequence[Callback] = (), *, is_main: bool = True) -> None:
        self.observers = list(observers) if is_main else []

    def on_train_start(self, run: RunInfo) -> None:
        self._tell("on_train_start", run)

    def on_batch(self, run: RunInfo, epoch: int, iteration: int, batch: Batch) -> None:
        self._tell("on_batch", run, epoch, iteration, batch)

    def on_epoch_end(self, run: RunInfo, row: Mapping[str, float]) -> None:
        self._tell("on_epoch_end", run, row)

    def on_train_end(self, run: RunInfo) -> None:
        self._tell("on_train_end", run)

    def _tell(self, event: str, *args: object) -> None:
        for observer in tuple(self.observers):
            try:
                getattr(observer, event)(*args)
            except Exception as error:  # whatever a logger raises, the training is worth more
                self.observers.remove(observer)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                print(f"warning: {type(observer).__name__} failed ({reason}) and is left out from now on", file=sys.stderr)
