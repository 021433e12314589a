"""MuSGD: SGD, and for matrices and filters a step along the orthogonalised momentum before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from engine.training.optimizers.orthogonal import orthogonalised

MUON = 0.2  # share of the learning rate for the orthogonalised step; SGD takes all of it
MATRIX_DIMS = (2, 4)  # of linear layers and of convolutions
MOST_VALUES = 1 << 24  # of weights that are orthogonalised together


class MuSGD(torch.optim.SGD):
    """Muon and SGD on the same weights, as published with YOLO26.

    For weights of two or four dimensions in groups with ``"muon": True``, taken as matrices of one row an output channel: ``b = m b +
    (1 - m) g``, ``u = m b + (1 - m) g``, ``w = w - 0.2 lr s orthogonalised(u)``, with s = max(1, rows / columns) ** 0.5 of a linear
    layer and of a filter's kernel (1 for a square one). Then SGD with Nesterov momentum and a momentum buffer of its own, as for all
    other weights.

    The matrices of one shape are orthogonalised together. Non-finite gradients, which ``found_inf`` says on the device, change nothing, and
    no step waits for the device.

    Args:
        params: groups; ``muon`` (False if left out) says whether a group's weights are matrices that multiply.
        lr: of both steps.
        momentum: of both buffers.
        options: as for torch.optim.SGD.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float, **options: Any) -> None:
        super().__init__(params, lr=lr, momentum=momentum, nesterov=momentum > 0, **options)
        for group in self.param_groups:
            group.setdefault("muon", False)
            for weight in group["params"]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
                if _is_matrix(group, weight):
                    self.state[weight]["muon_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None and _is_matrix(group, w)]
            for alike in _of_one_shape(weights):
                self._muon_step(alike, group, found_inf)
        super().step(closure)

    def _muon_step(self, weights: list[Parameter], group: dict[str, Any], found_inf: Tensor | None) -> None:
        """The orthogonalised step of weights of one shape."""
        momentum, shape = group["momentum"], weights[0].shape
        buffers = [self.state[w]["muon_buffer"] for w in weights]
        gradients = torch.stack([w.grad for w in weights if w.grad is not None])
        before = torch.stack(buffers)
        after = before.lerp(gradients, 1 - momentum)
        if found_inf is not None:
            skipped = found_inf.bool()
            after, gradients = torch.where(skipped, before, after), gradients.masked_fill(skipped, 0)
        update = orthogonalised(gradients.lerp(after, momentum).flatten(2)).view(-1, *shape)
        rate = -group["lr"] * MUON * max(1.0, shape[-2] / shape[-1]) ** 0.5
        update = update * rate if found_inf is None else update * (rate * (1 - found_inf))
        torch._foreach_copy_(buffers, list(after.unbind()))
        torch._foreach_add_(list[Tensor](weights), list(update.unbind()))


class _Alike(NamedTuple):
    shape: torch.Size
    device: torch.device
    dtype: torch.dtype


def _is_matrix(group: dict[str, Any], weight: Tensor) -> bool:
    return group["muon"] and weight.ndim in MATRIX_DIMS


def _of_one_shape(weights: Iterable[Parameter]) -> Iterator[list[Parameter]]:
    """The weights in lists of one shape, device and type, none with more values than memory should hold twice."""
    alike: dict[_Alike, list[Parameter]] = defaultdict(list)
    for weight in weights:
        alike[_Alike(weight.shape, weight.device, weight.dtype)].append(weight)
    for members in alike.values():
        most = max(1, MOST_VALUES // members[0].numel())
        for start in range(0, len(members), most):
            yield members[start : start + most]
