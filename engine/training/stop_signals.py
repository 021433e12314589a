"""Ctrl-C and SIGTERM in a training: the first lets the step come to its end and be saved, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A stop that was asked for, at a moment at which everything can be saved."""


class StopSignals:
    """While entered, a first Ctrl-C or SIGTERM only sets ``requested``; the loop that sees it raises Stopped where it can be saved.

    In threads other than the main one signals cannot be caught, and everything stays as it is.
    """

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        self.requested = False
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
        if kind is None and self.requested:
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, nothing changes that a save holds: there is nothing to wait for."""
        if self.requested:
            raise Stopped
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._at_once:
            raise Stopped
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # print is not safe in a handler
