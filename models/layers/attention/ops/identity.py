"""Identity start: an inserted module starts as the identity, so that a pre-trained network's output is unchanged at the first step."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class IdentityStart(nn.Module):
    """x + γ (m(x) - x) with γ = 0 at first: the identity, whether ``m`` has a residual of its own or not.

    γ is one number; at γ = 1 the result is the plain module's. The module's own parameters get their first gradient once γ is
    not zero, that is from the second step on.

    Args:
        module: the same-width module; its keys become ``m.*``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.m = module
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.gamma.to(x.dtype) * (self.m(x) - x)
