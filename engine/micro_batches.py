"""Micro-batches: a batch that is too large for the memory is split, and the gradients of its micro-batches are summed.

Order, learning rate and position of the run do not change: a step is still of the whole batch. Only batch statistics and normalisers of
the loss are of a micro-batch, as they are of a batch when gradients are accumulated.
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
    """Results of a forward and backward pass."""

    parts: dict[str, Tensor]  # of the loss, means over the images
    side_px: int  # width of the network's input


class MicroBatches:
    """Runs batches through a network: whole at first, in 2, 4, 8, ... micro-batches after the memory was full."""

    def __init__(self, device: torch.device) -> None:
        self.count = 1  # micro-batches of a batch
        self.device = device

    def results(
        self, batch: Batch, one_pass: Callable[[Batch], Result], *, place: str, undo: Callable[[], None] = lambda: None
    ) -> list[tuple[Batch, Result]]:
        """The results of ``one_pass`` for each micro-batch of a batch on the host; starts over with smaller ones when the memory is full.

        Args:
            undo: reverts what unfinished passes have changed.
            place: position of the run, for the message.

        Raises:
            UserError: one image alone is too much.
        """
        while True:
            try:
                return [(part, one_pass(part)) for part in split(batch, self.count)]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.count >= len(batch.images):
                    side, reason = max(batch.images.shape[-2:]), str(error).partition("\n")[0]
                    raise UserError(f"{place}: the memory is full with a single image of {side} px, lower --imgsz ({reason})") from None
            undo()  # outside the handler: the error referenced the frames, and these the activations
            release_memory(self.device)
            self._halve(batch, place)

    def _halve(self, batch: Batch, place: str) -> None:
        before, self.count = self.count, self.count * 2
        images, side = len(batch.images), max(batch.images.shape[-2:])
        full, now = (-(-images // count) for count in (before, self.count))
        print(
            f"warning: {place}: the memory is full with {full} image(s) of {side} px; the network takes {now} at a time from here on, "
            f"the batch remains {images}",
            file=sys.stderr,
        )


class TrainingMicroBatches(MicroBatches):
    """Micro-batches of a training; an unfinished pass is reverted.

    With several ranks batches are not split, as collectives of an unfinished pass cannot be reverted: there the error is raised.
    """

    def __init__(self, model: nn.Module, loss: Loss, guard: NonFiniteGuard, device: torch.device) -> None:
        super().__init__(device)
        self.loss, self.guard = loss, guard
        self.parameters = list(model.parameters())
        self.buffers = [b for b in model.buffers() if b.numel()]
        self._saved_buffers = [b.clone() for b in self.buffers]

    def run(self, batch: Batch, one_pass: Callable[[Batch], Pass], *, place: str) -> Pass:
        """Passes over a batch on the host; adds the gradients of its micro-batches to those already summed. Raises like ``results``."""
        if distributed.is_distributed():
            return one_pass(batch)
        summed = self._detach_gradients()
        before = (self.loss.state_dict(), self.guard.pending_count())
        results = self.results(batch, one_pass, place=place, undo=partial(self._undo, *before))
        self._add_gradients(summed)
        if len(results) == 1:
            return results[0][1]
        return Pass(mean_parts([(result.parts, len(part.images)) for part, result in results]), results[0][1].side_px)

    def _detach_gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Removes the summed gradients from the parameters and returns them, not copied; backs up the buffers."""
        summed = [(p, p.grad) for p in self.parameters if p.grad is not None]
        for parameter, _ in summed:
            parameter.grad = None
        _copy(self._saved_buffers, self.buffers)
        return summed

    def _undo(self, loss: Mapping[str, Tensor], pending: int) -> None:
        """Reverts unfinished passes: gradients, buffers, state of the loss, and the guard's pending batches."""
        for parameter in self.parameters:
            parameter.grad = None
        _copy(self.buffers, self._saved_buffers)
        self.loss.load_state_dict(loss)
        self.guard.rewind(pending)

    def _add_gradients(self, summed: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Adds the present gradients to the removed ones, in place, and gives these back to the parameters."""
        new = [p.grad for p, _ in summed]
        for parameter, old in summed:
            parameter.grad = old
        pairs = [(old, grad) for (_, old), grad in zip(summed, new) if grad is not None]
        if pairs:
            torch._foreach_add_([old for old, _ in pairs], [grad for _, grad in pairs])


def split(batch: Batch, count: int) -> list[Batch]:
    """A batch on the host in ``count`` micro-batches of nearly equal size (at least one image each), in order."""
    images = len(batch.images)
    count = min(count, images)
    if count <= 1:
        return [batch]
    edges = [images * k // count for k in range(count + 1)]
    return [_slice(batch, first, end) for first, end in pairwise(edges)]


def _slice(batch: Batch, first: int, end: int) -> Batch:
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
        finish=None if batch.finish is None else batch.finish[first:end],
    )


def mean_parts(parts: Sequence[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """The means over a batch, from those over its micro-batches and their numbers of images."""
    total = sum(images for _, images in parts)
    names = parts[0][0]
    return {name: torch.stack([values[name].detach() * (images / total) for values, images in parts]).sum() for name in names}


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    """By type: with mixed types each tensor would cost a kernel."""
    for dtype in {t.dtype for t in to}:
        torch._foreach_copy_([t for t in to if t.dtype == dtype], [s for t, s in zip(to, source) if t.dtype == dtype])
