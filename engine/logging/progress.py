"""The progress bar of an epoch and the running means that it shows, without a device synchronization at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils.distributed import all_reduce_sum
from utils.memory import peak_bytes

if TYPE_CHECKING:
    from data.loader import BatchLoader

BAR = "{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} {elapsed} {rate_fmt}"


class LossMeter:
    """Means of the loss parts over all ranks, summed on the device; only ``means`` waits for it, and for the other ranks.

    Args:
        names: of the parts.
        finite_only: leave out batches with a non-finite part, as their step is skipped.
    """

    def __init__(self, names: Sequence[str], *, finite_only: bool = False) -> None:
        self.names, self.finite_only = tuple(names), finite_only
        self.count = 0  # updates
        self._sum: Tensor | None = None  # (parts + 1,), the last is the number of batches that were summed

    def update(self, parts: dict[str, Tensor], *, counts: bool = True) -> None:
        """Adds a batch; one that does not count has no image of its own and only takes part in the step of the other ranks."""
        values = torch.stack([parts[name].detach().float() for name in self.names])
        values = values if counts else torch.zeros_like(values)
        values = torch.cat((values, values.new_ones(1)))
        if self.finite_only:
            values = torch.where(torch.isfinite(values).all(), values, 0.0)
        self._sum = values if self._sum is None else self._sum + values
        self.count += 1

    def means(self) -> dict[str, float]:
        """The means, in one transfer from the device; NaN where nothing was added."""
        values = [float("nan")] * len(self.names)
        if self._sum is not None:
            total = all_reduce_sum(self._sum)
            values = (total[:-1] / total[-1]).tolist()
        return dict(zip(self.names, values))

    def reset(self) -> None:
        self._sum, self.count = None, 0

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._sum is None else {"sum": self._sum, "count": torch.tensor(self.count)}

    def load_state_dict(self, state: Mapping[str, Tensor], *, device: torch.device | str) -> None:
        self.reset()
        if state:
            self._sum, self.count = state["sum"].to(device), int(state["count"])


class EpochBar:
    """A tqdm bar over the batches of an epoch, described by epoch, memory, losses and sizes.

    Args:
        batches: of the whole epoch, by length; iterating yields those that are left.
        done: batches that were trained on before a resume.
        shown: whether anything is printed.
        objects: what an iteration's objects are called.
    """

    def __init__(
        self, batches: BatchLoader, *, names: Sequence[str], epoch: int, epochs: int, done: int = 0, shown: bool = True,
        objects: str = "boxes",
    ) -> None:  # fmt: skip
        from tqdm import tqdm

        if shown:
            print("".join(f"{title:>10}" for title in ("epoch", "memory", *names, objects, "px")))
        self.place = f"{epoch + 1}/{epochs}"
        self.bar = tqdm(batches, total=len(batches), initial=done, disable=not shown, bar_format=BAR)

    def __iter__(self) -> Iterator[Any]:
        with self.bar:
            yield from self.bar

    def show(self, losses: dict[str, float], *, device: torch.device, boxes: int, side: int) -> None:
        columns = (self.place, memory_used(device), *(f"{v:.4g}" for v in losses.values()), str(boxes), str(side))
        self.bar.set_description_str("".join(f"{column:>10}" for column in columns), refresh=False)


def memory_used(device: torch.device) -> str:
    """Memory reserved on a GPU, or the peak memory of this process on a CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.memory_reserved(device) / 2**30:.2f}G"
    peak = peak_bytes()
    return "-" if peak is None else f"{peak / 2**30:.2f}G"
