"""Callbacks of a training run. They are called on the main rank only, and observe the run without changing it.

A callback that raises is removed with a warning; the run continues.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.logging.observing import reason_of
from tasks import Task
from utils.types import Batch


@dataclass(frozen=True)
class RunInfo:
    """What callbacks get of a run.

    Attributes:
        names: of the classes.
        parts: names of the loss parts.
        start_epoch: above 0 after a resume.
        rows: of results.csv, of all epochs that are done.
        epochs: that are to be trained in all; 0 where it is not known.
    """

    save_dir: Path
    names: tuple[str, ...]
    parts: tuple[str, ...]
    task: Task
    start_epoch: int = 0
    rows: tuple[Mapping[str, float], ...] = ()
    epochs: int = 0


class Callback:
    """Base class; every method does nothing unless overridden."""

    def on_train_start(self, run: RunInfo) -> None:
        """Once, before the first epoch."""

    def on_batch(self, run: RunInfo, epoch: int, iteration: int, batch: Batch) -> None:
        """After each iteration; ``batch`` is the network's input, on the host."""

    def on_epoch_end(self, run: RunInfo, row: Mapping[str, float]) -> None:
        """After validation and saving, with the row of results.csv."""

    def on_train_end(self, run: RunInfo) -> None:
        """Once, also after an early stop."""


class Callbacks(Callback):
    """Calls several callbacks in turn; empty on all ranks but the main one."""

    def __init__(self, callbacks: Sequence[Callback] = (), *, is_main: bool = True) -> None:
        self.callbacks = list(callbacks) if is_main else []

    def on_train_start(self, run: RunInfo) -> None:
        self._call("on_train_start", run)

    def on_batch(self, run: RunInfo, epoch: int, iteration: int, batch: Batch) -> None:
        self._call("on_batch", run, epoch, iteration, batch)

    def on_epoch_end(self, run: RunInfo, row: Mapping[str, float]) -> None:
        self._call("on_epoch_end", run, row)

    def on_train_end(self, run: RunInfo) -> None:
        self._call("on_train_end", run)

    def _call(self, event: str, *args: object) -> None:
        for callback in tuple(self.callbacks):
            try:
                getattr(callback, event)(*args)
            except Exception as error:  # no failure of a logger may end a training
                self.callbacks.remove(callback)
                print(f"warning: {type(callback).__name__} failed ({reason_of(error)}) and is left out from now on", file=sys.stderr)
