"""A batch that is too large for the memory goes through the network in portions whose gradients are added up.

Order, learning rate and position of the run stay what they are: a step is still of the whole batch. Only batch statistics, and
normalisers of the loss, are of a portion, as they are of a batch when gradients are accumulated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from utils import distributed
from utils.errors import UserError
from utils.memory import is_out_of_memory, release_memory
from utils.types import Batch

if TYPE_CHECKING:
    from engine.training.nonfinite_guard import NonFiniteGuard
    from models.heads.base import Loss

Result = TypeVar("Result")


class Pass(NamedTuple):
    """What is left of a forward and backward pass."""

    parts: dict[str, Tensor]  # of the loss, means over the images
    side_px: int  # width of the network's input


class MicroBatches:
    """How batches go through a network: whole, and in 2, 4, 8, ... portions once the memory was full."""

    def __init__(self, device: torch.device) -> None:
        self.count = 1  # portions of a batch
        self.device = device

    def results(
        self, batch: Batch, one_pass: Callable[[Batch], Result], *, place: str, undo: Callable[[], None] = lambda: None
    ) -> list[tuple[Batch, Result]]:
        """What ``one_pass`` makes of each portion of a batch on the host; begins anew with smaller ones when the memory is full.

        Args:
            undo: takes back what passes have changed.
            place: where the run is, for the message.

        Raises:
            UserError: one image alone is too much.
        """
        while True:
            try:
                return [(portion, one_pass(portion)) for portion in split(batch, self.count)]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.count >= len(batch.images):
                    side, reason = max(batch.images.shape[-2:]), str(error).partition("\n")[0]
                    raise UserError(f"{place}: the memory is full with a single image of {side} px, lower --imgsz ({reason})") from None
            undo()  # out of the handler: the error held the frames, and these the activations
            release_memory(self.device)
            self._halve(batch, place)

    def _halve(self, batch: Batch, place: str) -> None:
        before, self.count = self.count, self.count * 2
        images, side = len(batch.images), max(batch.images.shape[-2:])
        full, now = (-(-images // count) for count in (before, self.count))
        print(
            f"warning: {place}: the memory is full with {full} image(s) of {side} px; the network takes {now} at a time from here on, "
            f"the batch stays of {images}",
            file=sys.stderr,
        )


class TrainingMicroBatches(MicroBatches):
    """The portions of a training; a pass that was not finished leaves no trace.

    Several processes have none: collectives of a half-done pass cannot be taken back, so there the error stays one.
    """

    def __init__(self, model: nn.Module, loss: Loss, guard: NonFiniteGuard, device: torch.device) -> None:
        super().__init__(device)
        self.loss, self.guard = loss, guard
        self.parameters = list(model.parameters())
        self.buffers = [b for b in model.buffers() if b.numel()]
        self._kept = [b.clone() for b in self.buffers]

    def run(self, batch: Batch, one_pass: Callable[[Batch], Pass], *, place: str) -> Pass:
        """Passes over a batch on the host; the gradients of its portions are added to those that wait. Raises like ``results``."""
        if distributed.is_distributed():
            return one_pass(batch)
        waiting = self._set_aside()
        before = (self.loss.state_dict(), self.guard.pending_count())
        results = self.results(batch, one_pass, place=place, undo=partial(self._undo, *before))
        self._add_back(waiting)
        if len(results) == 1:
            return results[0][1]
        return Pass(mean_parts([(p.parts, len(portion.images)) for portion, p in results]), results[0][1].side_px)

    def _set_aside(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The gradients that wait, by reference; the buffers are copied."""
        waiting = [(p, p.grad) for p in self.parameters if p.grad is not None]
        for parameter, _ in waiting:
            parameter.grad = None
        _copy(self._kept, self.buffers)
        return waiting

    def _undo(self, loss: Mapping[str, Tensor], mark: int) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        _copy(self.buffers, self._kept)
        self.loss.load_state_dict(loss)
        self.guard.rewind(mark)

    def _add_back(self, waiting: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        new = [p.grad for p, _ in waiting]
        for parameter, old in waiting:
            parameter.grad = old
        pairs = [(old, grad) for (_, old), grad in zip(waiting, new) if grad is not None]
        if pairs:
            torch._foreach_add_([old for old, _ in pairs], [grad for _, grad in pairs])


def split(batch: Batch, count: int) -> list[Batch]:
    """The images of a batch on the host in ``count`` portions (at least one image each), as even as can be, in order."""
    images = len(batch.images)
    count = min(count, images)
    if count <= 1:
        return [batch]
    edges = [images * k // count for k in range(count + 1)]
    return [_portion(batch, first, end) for first, end in pairwise(edges)]


def _portion(batch: Batch, first: int, end: int) -> Batch:
    image = batch.targets.image
    targets = batch.targets[(image >= first) & (image < end)]
    targets = targets.replace(image=targets.image - first)
    most = int(torch.bincount(targets.image).max()) if len(targets) else 0
    return batch._replace(
        images=batch.images[first:end],
        targets=targets,
        paths=batch.paths[first:end],
        letterbox=batch.letterbox.select(slice(first, end)),
        max_boxes=most,
    )


def mean_parts(parts: Sequence[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """The means over a batch, from those over its portions and their images."""
    total = sum(images for _, images in parts)
    names = parts[0][0]
    return {name: torch.stack([values[name].detach() * (images / total) for values, images in parts]).sum() for name in names}


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, source)
