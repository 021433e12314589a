"""Steps whose loss or gradient is not finite change nothing; they are counted, their files are named, and too many in a row end the run.

A non-finite loss makes its whole gradient non-finite, on every process, so the norm of the gradient alone decides about a step. That
decision stays on the device (``engine.training.optim.optimizer_step``): only ``check`` waits for it, where the losses are logged anyway.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from utils import distributed
from utils.errors import UserError

LISTED = 200  # batches that are written down, of one run
FILE = "nan_batches.txt"
HALVINGS = 24  # of a scaler's factor, one after another, that are its search for a factor; it begins at 2^16


class Diverged(UserError):
    """Too many losses in a row were not finite."""


class PendingBatch(NamedTuple):
    """A batch that waits for its verdict."""

    epoch: int
    iteration: int
    paths: tuple[str, ...]
    losses: Tensor  # (parts + 1,) on the device, the last is their sum

    def place(self) -> str:
        return f"epoch {self.epoch + 1}, iteration {self.iteration + 1}"


class NonFiniteGuard:
    """Watches the losses and steps of a run.

    Args:
        parts: names of the loss parts.
        patience: steps without a usable loss, one after another, that end the run; 0 never does.
        folder: where ``nan_batches.txt`` is written.
        scaled: a gradient scaler is at work: it deals with gradients that overflow by itself, so only losses count, and gradients that
            are not finite whatever its factor is.
    """

    def __init__(self, model: nn.Module, parts: Sequence[str], *, patience: int, folder: Path, scaled: bool = False) -> None:
        self.parts, self.patience, self.folder, self.scaled = tuple(parts), patience, folder, scaled
        self.names = (*(f"{name} loss" for name in self.parts), "loss")
        self.in_row = self.skipped = self.listed = self.overflows = 0
        self._statistics = BufferBackup(model)
        self._waiting: list[PendingBatch] = []  # their gradients are not stepped yet
        self._steps: list[tuple[list[PendingBatch], Tensor]] = []  # since the last look, with (2,) bool: taken, non_finite

    def checked(self, parts: dict[str, Tensor], *, epoch: int, iteration: int, paths: tuple[str, ...]) -> Tensor:
        """The sum of the parts; its gradient is not finite where the sum is none."""
        total = cast("Tensor", sum(parts.values()))
        losses = torch.stack([*(parts[name].detach().float() for name in self.parts), total.detach().float()])
        self._waiting.append(PendingBatch(epoch, iteration, paths, losses))
        return total * torch.where(torch.isfinite(total.detach()), 1.0, math.nan).to(total.dtype)

    def non_finite(self) -> Tensor:
        """() bool on the device: whether a loss that waits for its step is not finite, on any process where a scaler wants to know."""
        finite = torch.isfinite(torch.stack([batch.losses[-1] for batch in self._waiting])).all()
        return distributed.all_reduce_sum((~finite).float()) > 0 if self.scaled else ~finite

    def after_step(self, taken: Tensor, non_finite: Tensor) -> None:
        """Puts the running statistics back where the step was not taken.

        Args:
            taken: () bool, on the device.
            non_finite: () bool, on the device, as before the step.
        """
        self._statistics.commit(taken)
        self._steps.append((self._waiting, torch.stack((taken, non_finite))))
        self._waiting = []

    def pending_count(self) -> int:
        """How many batches wait for their step, for :meth:`rewind`."""
        return len(self._waiting)

    def rewind(self, mark: int) -> None:
        """Forgets the batches since the mark: their passes were not finished."""
        del self._waiting[mark:]

    def check(self) -> None:
        """Waits for the device and counts the steps since the last look.

        Raises:
            UserError: too many in a row were not taken; the message says where and what to try.
        """
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        verdicts = torch.stack([verdict for _, verdict in steps]).tolist()
        for (batches, _), (taken, non_finite) in zip(steps, verdicts):
            self.overflows = 0 if taken or non_finite else self.overflows + 1
            if taken:
                self.in_row = 0
            elif non_finite or not self.scaled or self.overflows > HALVINGS:  # else the scaler lowers its factor
                self._count(batches)

    def report(self, epoch: int) -> None:
        """Says how many steps of the epoch were skipped, if any, and begins to count anew."""
        self.check()
        if self.skipped and distributed.is_main():
            where = f"; their files are named in {self.folder / FILE}" if self.listed else ""
            reason = f"{self.skipped} step(s) were skipped, loss or gradient was not finite"
            print(f"warning: epoch {epoch + 1}: {reason}{where}", file=sys.stderr)
        self.skipped = 0

    def keep_statistics(self) -> None:
        """Takes the model's present statistics as good, after they were loaded."""
        self._statistics.keep()

    def state_dict(self) -> dict[str, int]:
        return {"in_row": self.in_row, "skipped": self.skipped, "listed": self.listed, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.in_row, self.skipped, self.listed, self.overflows = (int(state.get(key, 0)) for key in self.state_dict())

    def _count(self, batches: list[PendingBatch]) -> None:
        losses = [batch.losses.tolist() for batch in batches]
        wrong = [(b, values) for b, values in zip(batches, losses) if not all(map(math.isfinite, values))]
        self.skipped += 1
        self.in_row += 1
        self._list(wrong or list(zip(batches, losses)))
        if self.patience and self.in_row >= self.patience:
            batch, values = wrong[0] if wrong else (batches[0], losses[0])
            parts = (f"the {name} became {value}" for name, value in zip(self.names, values) if not math.isfinite(value))
            part = next(parts, "the gradient is not finite")
            times = f" for {self.in_row} steps in a row" if self.in_row > 1 else ""
            raise Diverged(
                f"{batch.place()}: {part}{times}; lower lr0 in --hyp, train with --amp bf16 or off, or look at the files named in "
                f"{self.folder / FILE}; --skip-nan skips any number of such steps"
            )

    def _list(self, found: list[tuple[PendingBatch, list[float]]]) -> None:
        """Appends the batches to the file, as long as it is not long."""
        found = found[: max(LISTED - self.listed, 0)]
        lines = []
        for batch, values in found:
            losses = ", ".join(f"{name} {value:.6g}" for name, value in zip(self.names, values))
            lines += [f"{batch.place()}: {losses}", *(f"  {path}" for path in batch.paths)]
        try:
            with open(self.folder / FILE, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(line + "\n" for line in lines)
        except OSError as error:
            print(f"warning: {self.folder / FILE}: cannot be written ({error.strerror or error})", file=sys.stderr)
        else:
            self.listed += len(found)


class BufferBackup:
    """The float buffers of a model as the last good step left them; a handful of kernels whatever their number."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers = [b for b in model.buffers() if b.is_floating_point() and b.numel()]
        sizes = [b.numel() for b in self.buffers]
        wide = torch.float64 if any(b.dtype is torch.float64 for b in self.buffers) else torch.float32  # holds every type exactly
        device = self.buffers[0].device if self.buffers else None
        self._kept, self._fresh = (torch.empty(sum(sizes), dtype=wide, device=device) for _ in range(2))
        self._kept_views, self._fresh_views = (
            [view.view(b.shape) for view, b in zip(flat.split(sizes), self.buffers)] for flat in (self._kept, self._fresh)
        )
        self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self._kept_views, self.buffers)

    @torch.no_grad()
    def commit(self, taken: Tensor) -> None:
        """Keeps the present buffers if the step was ``taken`` () bool, else puts the kept ones back."""
        if self.buffers:
            torch._foreach_copy_(self._fresh_views, self.buffers)
            self._kept.copy_(torch.where(taken, self._fresh, self._kept))
            torch._foreach_copy_(self.buffers, self._kept_views)
