"""Ctrl-C and SIGTERM in a training: the first stops after the current step, which is saved, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A stop that was requested, raised where the whole state can be saved."""


class StopSignals:
    """While entered, a first Ctrl-C or SIGTERM only sets ``requested``; the training loop then raises Stopped where it can be saved.

    Signals are handled by the main thread only: in other threads entering has no effect.
    """

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        self.requested = False
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
        if kind is None and self.requested:
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a requested stop raises Stopped at once, as nothing changes that a checkpoint stores (validation)."""
        if self.requested:
            raise Stopped
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._at_once:
            raise Stopped
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # print is not safe in a handler
