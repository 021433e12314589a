"""A stopwatch with stages, which measures work that runs asynchronously on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")


class Stopwatch:
    """Seconds by stage.

    On CUDA it synchronizes at both ends of a stage, so that the stage includes its own work on the device and no other.

    Args:
        device: that the stages run on.
        stages: names that are reported even if they never run, in their order.

    Attributes:
        seconds: of every stage, summed; in the order in which stages were first measured.
    """

    def __init__(self, device: torch.device, stages: Iterable[str] = ()) -> None:
        self.device = device
        self.seconds: dict[str, float] = dict.fromkeys(stages, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds that the block takes; nothing if it raises."""
        start = self.now()
        yield
        self.add(name, self.now() - start)

    def draw(self, items: Iterable[Item], name: str) -> Iterator[Item]:
        """Yields the items and adds the seconds that producing each takes, such as waiting for a loader's batches."""
        iterator = iter(items)
        while True:
            start = self.now()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.add(name, self.now() - start)
            yield item

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds that were measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def ms_per_item(self, count: int) -> dict[str, float]:
        """Milliseconds of every stage divided by the number of items, such as images; 0 items count as 1."""
        return {name: 1000 * seconds / max(count, 1) for name, seconds in self.seconds.items()}

    def now(self) -> float:
        """Seconds of a monotonic clock, after the work that the device has been given so far."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()
