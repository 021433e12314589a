"""The exponential moving average of a model's weights: what is validated and saved."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor, nn


class ModelEMA:
    """Keeps ``ema = d * ema + (1 - d) * model`` with ``d(n) = decay * (1 - exp(-n / tau))`` at update n, the first being 1.

    Float buffers (running statistics) are averaged too, integers stay. The average is float32 whatever the model is.
    The model's tensors are looked up once: build the average after the model is on its device, and change weights in place from then on.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.9999, tau: float = 2000.0) -> None:
        self.model = deepcopy(model).float().eval().requires_grad_(False)
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
    def update(self, taken: Tensor | None = None) -> None:
        """One step towards the model; a handful of fused kernels whatever the number of tensors.

        Args:
            taken: () bool on the device; where it is false the average stays as it is. Nothing waits for it.
        """
        self.updates += 1
        part = 1 - self.decay(self.updates)
        if any(mine.dtype != other.dtype for mine, other in zip(self._own, self._theirs)):
            theirs = [other.to(mine.dtype) for mine, other in zip(self._own, self._theirs)]
        else:
            theirs = self._theirs
        if taken is None or (taken.device.type == "cpu" and taken):  # where asking costs nothing
            torch._foreach_lerp_(self._own, theirs, part)
        elif taken.device.type != "cpu":
            self._blend_where(taken, theirs, part)

    def _blend_where(self, taken: Tensor, theirs: list[Tensor], part: float) -> None:
        change = torch._foreach_sub(theirs, self._own)
        torch._foreach_mul_(change, taken.float() * part)
        torch._foreach_add_(self._own, change)

    def state_dict(self) -> dict[str, object]:
        return {"weights": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["weights"])
        self.updates = int(state["updates"])
