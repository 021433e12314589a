"""Running statistics of the moving average, measured with its own weights: the mean of what some training batches give.

In training they follow the weights with a delay, and the average of weights is none that they were measured with. After Wu & Johnson,
"Rethinking 'Batch' in BatchNorm" (arXiv:2105.07576), section 3: precise batch norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from data.augment.on_device import finished
from utils import distributed
from utils.precision import autocast
from utils.random_state import random_state, set_random_state
from utils.types import Batch, to_unit_range

if TYPE_CHECKING:
    from engine.training.run import Run


MAX_KEPT_BYTES = 1 << 30  # of images; where the first batches have more, the loader makes them again


@dataclass
class FirstBatches:
    """The first ``count`` batches of an epoch in host memory, so that they need not be loaded twice."""

    count: int
    batches: list[Batch] = field(default_factory=list)

    def see(self, index: int, batch: Batch) -> None:
        """Takes the batch ``index`` of an epoch, from 0, where it is among the first and those before it are here."""
        if index == 0:
            self.batches.clear()
        if index == len(self.batches) < self.count and sum(b.images.nbytes for b in (*self.batches, batch)) <= MAX_KEPT_BYTES:
            self.batches.append(batch)

    def take(self, batches: int) -> list[Batch]:
        """Those of an epoch of so many batches, which are then forgotten; none where some are missing, as after a resume."""
        kept, self.batches = self.batches, []
        return kept if len(kept) == min(self.count, batches) else []


def estimate_running_statistics(run: Run, epoch: int) -> None:
    """Measures the running statistics of the moving average on the first ``--precise-bn`` batches of an epoch.

    All ranks call it; each measures its share of the batches, and every one gets the mean over all. Neither the random state nor the order
    of the data of later epochs changes.
    """
    if not any(isinstance(m, _BatchNorm) for m in run.state.ema.model.modules()):
        return
    model, loader, random = run.state.ema.model, run.loaders.train, random_state()
    frozen = [model.model[index] for index in run.state.frozen.rows]
    try:
        if kept := run.first_batches.take(len(loader)):
            measure(model, kept, device=run.device, precision=run.step.precision, frozen=frozen)
            return
        loader.set_epoch(epoch, class_ap=run.progress.class_ap)
        with closing(iter(loader)) as batches:  # type: ignore[type-var]
            first = islice(batches, run.first_batches.count)
            measure(model, first, device=run.device, precision=run.step.precision, frozen=frozen)
    finally:
        set_random_state(random)


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    precision: torch.dtype | None = None,
    frozen: Sequence[nn.Module] = (),
) -> None:
    """Sets running mean and variance of every batch norm to the mean over batches, each of equal weight.

    Statistics that come out non-finite, or of layers that no batch reaches, stay as they were.

    Args:
        model: in evaluation mode, which it stays in but for its batch norms.
        batches: of training; those that count nowhere are left out.
        device: where the model is.
        precision: of the forward pass, None for float32.
        frozen: parts of the model whose statistics stay.
    """
    kept = {module for part in frozen for module in part.modules()}
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m not in kept]
    before = [(norm.momentum, {name: value.clone() for name, value in norm.named_buffers()}) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    handles = average_calls(norms)
    try:
        for batch in batches:
            if batch.images_of_step:
                with autocast(device, precision):
                    model(to_unit_range(finished(batch.to(device)).images, precision or torch.float32))
    finally:
        for handle in handles:
            handle.remove()
        for norm, (momentum, buffers) in zip(norms, before):
            norm.momentum = momentum
            norm.eval()
            _finish(norm, buffers)


def average_calls(norms: Sequence[_BatchNorm]) -> list[RemovableHandle]:
    """Lets batch norms in training average all calls from now on; their number is counted on the host, so that it need not wait.

    torch does the same for a momentum of None, but reads the number from the device.
    """
    calls = dict.fromkeys(norms, 0)

    def weigh(norm: nn.Module, _: object) -> None:
        assert isinstance(norm, _BatchNorm)
        calls[norm] += 1
        norm.momentum = 1 / calls[norm]

    return [norm.register_forward_pre_hook(weigh) for norm in norms]


def _finish(norm: _BatchNorm, before: dict[str, torch.Tensor]) -> None:
    """The mean over all ranks of what one layer has measured; what it had before where that is non-finite."""
    assert norm.num_batches_tracked is not None
    own = norm.num_batches_tracked.float()
    batches = distributed.all_reduce_sum(own)
    for name in ("running_mean", "running_var"):
        value = getattr(norm, name)
        mean = distributed.all_reduce_sum(torch.where(own > 0, value * own, 0.0)) / batches
        value.copy_(torch.where((batches > 0) & mean.isfinite().all(), mean, before[name]))
    norm.num_batches_tracked.copy_(before["num_batches_tracked"])
