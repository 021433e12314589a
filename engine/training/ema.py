"""The exponential moving average of a model's weights: what is validated and saved."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class ModelEMA(Generic[Network]):
    """Keeps ``ema = d * ema + (1 - d) * model`` with ``d(n) = decay * (1 - exp(-n / tau))`` at update n, the first being 1.

    Float buffers (running statistics) are averaged too, integers stay. The average is float32 whatever the model is.
    The model's tensors are collected once: build the average after the model is on its device, and change weights in place from then on.
    """

    def __init__(self, model: Network, *, decay: float = 0.9999, tau: float = 2000.0) -> None:
        self.model: Network = deepcopy(model).float().eval().requires_grad_(False)
        self.decay_limit = decay
        self.tau = tau
        self.updates = 0
        own = self.model.state_dict()
        theirs = model.state_dict()
        names = [name for name, value in own.items() if value.is_floating_point()]
        self._own: list[Tensor] = [own[name] for name in names]
        self._theirs: list[Tensor] = [theirs[name] for name in names]

    def decay(self, update: int) -> float:
        return self.decay_limit * (1 - math.exp(-update / self.tau))

    @torch.no_grad()
    def update(self, applied: Tensor | None = None) -> None:
        """Moves the average towards the model, in a few fused kernels whatever the number of tensors.

        Args:
            applied: () bool on the device, whether the optimizer step was applied; if not, the average stays as it is. Does not
                synchronize on a GPU.
        """
        self.updates += 1
        part = 1 - self.decay(self.updates)
        if any(mine.dtype != other.dtype for mine, other in zip(self._own, self._theirs)):
            theirs = [other.to(mine.dtype) for mine, other in zip(self._own, self._theirs)]
        else:
            theirs = self._theirs
        if applied is None or (applied.device.type == "cpu" and applied):  # reading it costs nothing on a CPU
            torch._foreach_lerp_(self._own, theirs, part)
        elif applied.device.type != "cpu":
            self._blend_where(applied, theirs, part)

    def _blend_where(self, applied: Tensor, theirs: list[Tensor], part: float) -> None:
        change = torch._foreach_sub(theirs, self._own)
        torch._foreach_mul_(change, applied.float() * part)
        torch._foreach_add_(self._own, change)

    def state_dict(self) -> dict[str, object]:
        return {"weights": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["weights"])
        self.updates = int(state["updates"])
