"""Effective squeeze and excitation: SE without the bottleneck that mixes channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.shared import global_mean
from models.layers.explained import explain_gate
from models.spec import channel_rules as rules
from models.spec.registry import register


@register(
    "EffectiveSE",
    "eSE",
    channels=rules.same_width,
    kind="attention",
    paper="CenterMask: Real-Time Anchor-Free Instance Segmentation, arXiv 1911.06667",
)
class EffectiveSE(nn.Module):
    """x · hard-σ(W mean(x)): one full-width layer, so that no channel's information is lost (equation 3 of the paper).

    Args:
        channels: channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """The channels' weights: (B, C, H, W) -> (B, C, 1, 1)."""
        return F.hardsigmoid(self.fc(global_mean(x)))
