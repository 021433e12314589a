"""Seconds by stage of a program whose work may run on a device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums seconds by stage; waits for the device at both ends of a stage, so that each pays for its own work.

    Attributes:
        seconds: by stage, in the order in which they were first timed.
    """

    def __init__(self, device: torch.device | None = None, stages: tuple[str, ...] = ()) -> None:
        self.device = device
        self.seconds: dict[str, float] = dict.fromkeys(stages, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what happens inside."""
        start = self.now()
        yield
        self.add(name, self.now() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds that were measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def now(self) -> float:
        """Seconds on a clock, after the device has finished its work."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
