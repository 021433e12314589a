"""SimAM: a pixel's weight from its distance to the channel's mean, without parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import full_precision
from models.layers.explained import explain_gate
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("SimAM", channels=rules.same_width, kind="attention", paper="SimAM: A Simple, Parameter-Free Attention Module, ICML 2021")
class SimAM(nn.Module):
    """x · σ(1/e*), 1/e* = (x - μ)² / (4 (σ² + λ)) + 1/2 (equations 5 and 6 of the paper), σ² over H W - 1 pixels.

    On a map of one pixel the published code divides 0 by 0; here the variance is 0 there. In float32, because σ² + λ must not underflow.

    Args:
        channels: channels in and out; any number.
        e_lambda: λ.
    """

    def __init__(self, channels: int | None = None, e_lambda: float = 1e-4) -> None:
        super().__init__()
        self.e_lambda = e_lambda

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """Weights of channels and pixels: (B, C, H, W) -> the same."""
        with full_precision(x):
            wide = x.float()
            distance = (wide - wide.mean((2, 3), keepdim=True)).square()
            # pixels - 1, at least 1, computed from the map so that a traced graph follows its size
            others = (torch.ones_like(wide[:1, :1]).sum() - 1).clamp(min=1)
            variance = distance.sum((2, 3), keepdim=True) / others
            weight = torch.sigmoid(distance / (4 * (variance + self.e_lambda)) + 0.5)
        return weight.to(x.dtype)

    def extra_repr(self) -> str:
        return f"e_lambda={self.e_lambda}"
