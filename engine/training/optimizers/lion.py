"""LION: the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """The sign of an interpolated momentum, with decoupled weight decay.

    ``u = sign(b1 * m + (1 - b1) * g)``, ``w = w - lr * (u + decay * w)``, ``m = b2 * m + (1 - b2) * g``: Chen et al., Symbolic Discovery of
    Optimization Algorithms, arXiv 2302.06675, algorithm 2. Its learning rate is to be three to ten times smaller than AdamW's.
    """

    def __init__(self, params: Iterable, *, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients = [p.grad for p in weights]
            for p in weights:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            momenta: list[Tensor] = [self.state[p]["momentum"] for p in weights]
            first, second = group["betas"]
            update = torch._foreach_lerp(momenta, gradients, 1 - first)
            torch._foreach_sign_(update)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, update, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - second)
