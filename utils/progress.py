"""The progress bar of an epoch and the running means behind it, without a wait for the device at every step."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

BAR = "{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} {elapsed} {rate_fmt}"


class LossMeter:
    """Means of the loss parts, added up on the device; only ``means`` waits for it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.count = 0
        self._sum: Tensor | None = None

    def update(self, parts: dict[str, Tensor]) -> None:
        values = torch.stack([parts[name].detach().float() for name in self.names])
        self._sum = values if self._sum is None else self._sum + values
        self.count += 1

    def means(self) -> dict[str, float]:
        """One transfer from the device; NaN before the first update."""
        values = [float("nan")] * len(self.names) if self._sum is None else (self._sum / self.count).tolist()
        return dict(zip(self.names, values))


class EpochBar:
    """A tqdm bar over the batches of an epoch whose description carries epoch, memory, losses and sizes."""

    def __init__(self, batches: Iterable[Any], *, total: int, names: Sequence[str], epoch: int, epochs: int, shown: bool = True) -> None:
        from tqdm import tqdm

        if shown:
            print("".join(f"{title:>10}" for title in ("epoch", "memory", *names, "boxes", "px")))
        self.place = f"{epoch + 1}/{epochs}"
        self.bar = tqdm(batches, total=total, disable=not shown, bar_format=BAR)

    def __iter__(self) -> Iterator[Any]:
        with self.bar:
            yield from self.bar

    def show(self, losses: dict[str, float], *, device: torch.device, boxes: int, side: int) -> None:
        columns = (self.place, memory_used(device), *(f"{v:.4g}" for v in losses.values()), str(boxes), str(side))
        self.bar.set_description_str("".join(f"{column:>10}" for column in columns), refresh=False)


def finite(losses: dict[str, float], where: str) -> dict[str, float]:
    """The losses, if they are numbers.

    Raises:
        UserError: one is NaN or infinite; the message says where, and what to try.
    """
    for name, value in losses.items():
        if not math.isfinite(value):
            hint = "lower lr0 in --hyp, or train with --amp off"
            raise UserError(f"{where}: the {name} loss became {value}; {hint} (weights/last.pt holds the epoch before)")
    return losses


def memory_used(device: torch.device) -> str:
    """Memory reserved on a GPU, or the most that this process ever held."""
    if device.type == "cuda":
        return f"{torch.cuda.memory_reserved(device) / 2**30:.2f}G"
    try:
        import resource
    except ImportError:  # not on Windows
        return "-"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f}G"
