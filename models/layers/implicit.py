"""Implicit knowledge: a learned vector added to, or multiplied with, every pixel (YOLOR, arXiv 2105.04206, sec. 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.spec import channel_rules as rules
from models.spec.registry import register


@register("ImplicitA", channels=rules.same_width, kind="block")
class ImplicitA(nn.Module):
    """x + a with one learned value a channel; (B, C, H, W) to the same."""

    def __init__(self, channels: int, *, mean: float = 0.0, std: float = 0.02) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.empty(1, channels, 1, 1).normal_(mean, std))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.implicit


@register("ImplicitM", channels=rules.same_width, kind="block")
class ImplicitM(nn.Module):
    """x · m with one learned value a channel; (B, C, H, W) to the same."""

    def __init__(self, channels: int, *, mean: float = 1.0, std: float = 0.02) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.empty(1, channels, 1, 1).normal_(mean, std))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.implicit
