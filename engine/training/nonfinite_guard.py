"""Steps with a non-finite loss or gradient change nothing; they are counted, their images are listed, and too many in a row end the run.

A non-finite loss makes its whole gradient non-finite, on every rank, so the norm of the gradient decides whether a step is applied.
The decision stays on the device (``engine.training.optim.optimizer_step``); only ``check`` waits for it, where losses are logged anyway.
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

MAX_LISTED = 200  # batches in the file, of one run
FILE = "nan_batches.txt"
MAX_HALVINGS = 24  # in a row, by which a gradient scaler searches its scale; it starts at 2^16


class Diverged(UserError):
    """Too many losses in a row were non-finite."""


class PendingBatch(NamedTuple):
    """A batch whose step has not been checked yet."""

    epoch: int
    iteration: int
    paths: tuple[str, ...]
    losses: Tensor  # (parts + 1,) on the device, the last is their sum

    def place(self) -> str:
        return f"epoch {self.epoch + 1}, iteration {self.iteration + 1}"


class NonFiniteGuard:
    """Checks the losses and steps of a run.

    Args:
        parts: names of the loss parts.
        patience: so many skipped steps in a row end the run; 0 never does.
        folder: where ``nan_batches.txt`` is written.
        scaled: a gradient scaler is in use: it handles overflowing gradients itself, so only non-finite losses count, and gradients that
            are non-finite at any scale.
    """

    def __init__(self, model: nn.Module, parts: Sequence[str], *, patience: int, folder: Path, scaled: bool = False) -> None:
        self.parts, self.patience, self.folder, self.scaled = tuple(parts), patience, folder, scaled
        self.names = (*(f"{name} loss" for name in self.parts), "loss")
        self.in_row = self.skipped = self.listed = self.overflows = 0
        self._statistics = BufferBackup(model)
        self._pending: list[PendingBatch] = []  # no step has used their gradients yet
        self._steps: list[tuple[list[PendingBatch], Tensor]] = []  # since the last check, with (2,) bool: applied, non_finite

    def total_loss(self, parts: dict[str, Tensor], *, epoch: int, iteration: int, paths: tuple[str, ...]) -> Tensor:
        """The sum of the loss parts () on the device, recorded for the next check; a non-finite sum gets a non-finite gradient."""
        total = cast("Tensor", sum(parts.values()))
        losses = torch.stack([*(parts[name].detach().float() for name in self.parts), total.detach().float()])
        self._pending.append(PendingBatch(epoch, iteration, paths, losses))
        return total * torch.where(torch.isfinite(total.detach()), 1.0, math.nan).to(total.dtype)

    def has_non_finite_loss(self) -> Tensor:
        """() bool on the device: whether a loss of the coming step is non-finite; on any rank, where a scaler needs to know."""
        finite = torch.isfinite(torch.stack([batch.losses[-1] for batch in self._pending])).all()
        return distributed.all_reduce_sum((~finite).float()) > 0 if self.scaled else ~finite

    def after_step(self, applied: Tensor, non_finite: Tensor) -> None:
        """Restores the running statistics where the step was not applied. Does not synchronize.

        Args:
            applied: () bool on the device.
            non_finite: () bool on the device, of ``has_non_finite_loss`` before the step.
        """
        self._statistics.commit(applied)
        self._steps.append((self._pending, torch.stack((applied, non_finite))))
        self._pending = []

    def pending_count(self) -> int:
        """Batches recorded since the last step, for :meth:`rewind`."""
        return len(self._pending)

    def rewind(self, count: int) -> None:
        """Keeps the first ``count`` pending batches: the passes of the others were not finished."""
        del self._pending[count:]

    def check(self) -> None:
        """Waits for the device and counts the skipped steps since the last check.

        Raises:
            Diverged: too many in a row were skipped; the message says where and what to try.
        """
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        outcomes = torch.stack([outcome for _, outcome in steps]).tolist()
        for (batches, _), (applied, non_finite) in zip(steps, outcomes):
            self.overflows = 0 if applied or non_finite else self.overflows + 1
            if applied:
                self.in_row = 0
            elif non_finite or not self.scaled or self.overflows > MAX_HALVINGS:  # else the scaler lowers its scale
                self._count_skipped(batches)

    def report(self, epoch: int) -> None:
        """Prints how many steps of the epoch were skipped, if any, and resets the count."""
        self.check()
        if self.skipped and distributed.is_main():
            where = f"; their files are named in {self.folder / FILE}" if self.listed else ""
            reason = f"{self.skipped} step(s) were skipped, loss or gradient was not finite"
            print(f"warning: epoch {epoch + 1}: {reason}{where}", file=sys.stderr)
        self.skipped = 0

    def save_statistics(self) -> None:
        """Backs up the model's running statistics, after they were loaded."""
        self._statistics.save()

    def state_dict(self) -> dict[str, int]:
        return {"in_row": self.in_row, "skipped": self.skipped, "listed": self.listed, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.in_row, self.skipped, self.listed, self.overflows = (int(state.get(key, 0)) for key in self.state_dict())

    def _count_skipped(self, batches: list[PendingBatch]) -> None:
        losses = [batch.losses.tolist() for batch in batches]
        wrong = [(b, values) for b, values in zip(batches, losses) if not all(map(math.isfinite, values))]
        self.skipped += 1
        self.in_row += 1
        self._write_batches(wrong or list(zip(batches, losses)))
        if self.patience and self.in_row >= self.patience:
            batch, values = wrong[0] if wrong else (batches[0], losses[0])
            parts = (f"the {name} became {value}" for name, value in zip(self.names, values) if not math.isfinite(value))
            part = next(parts, "the gradient is not finite")
            times = f" for {self.in_row} steps in a row" if self.in_row > 1 else ""
            raise Diverged(
                f"{batch.place()}: {part}{times}; lower lr0 in --hyp, train with --amp bf16 or off, or look at the files named in "
                f"{self.folder / FILE}; --skip-nan skips any number of such steps"
            )

    def _write_batches(self, found: list[tuple[PendingBatch, list[float]]]) -> None:
        """Appends the batches to the file, up to ``MAX_LISTED``."""
        found = found[: max(MAX_LISTED - self.listed, 0)]
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
    """The float buffers of a model after the last applied step; copied in a few kernels whatever their number."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers = [b for b in model.buffers() if b.is_floating_point() and b.numel()]
        sizes = [b.numel() for b in self.buffers]
        wide = torch.float64 if any(b.dtype is torch.float64 for b in self.buffers) else torch.float32  # holds every type exactly
        device = self.buffers[0].device if self.buffers else None
        self._saved, self._current = (torch.empty(sum(sizes), dtype=wide, device=device) for _ in range(2))
        self._saved_views, self._current_views = (
            [view.view(b.shape) for view, b in zip(flat.split(sizes), self.buffers)] for flat in (self._saved, self._current)
        )
        self.save()

    @torch.no_grad()
    def save(self) -> None:
        """Backs up the present values."""
        if self.buffers:
            torch._foreach_copy_(self._saved_views, self.buffers)

    @torch.no_grad()
    def commit(self, applied: Tensor) -> None:
        """Backs up the present values if the step was ``applied`` (() bool on the device), else restores the saved ones."""
        if self.buffers:
            torch._foreach_copy_(self._current_views, self.buffers)
            self._saved.copy_(torch.where(applied, self._current, self._saved))
            torch._foreach_copy_(self.buffers, self._saved_views)
