"""Gather and excite: a channel's weight at a pixel from the channel's values in a neighbourhood."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.shared import PooledBatchNorm2d, global_mean
from models.layers.explained import explain_gate
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks, arXiv 1810.12348"


@register("GE", "GatherExcite", channels=rules.same_width, kind="attention", paper=PAPER)
class GE(nn.Module):
    """x · σ(upsample(gather(x))) (equation 1 of the paper): the learned gather GE-θ or, over the whole map, GE-θ⁻ without parameters.

    GE-θ gathers an extent of e px by log₂ e depth-wise 3x3 convolutions of stride 2, each with a batch norm, ReLU between them.

    Args:
        channels: channels in and out.
        extent: e, a power of 2 from 2 on; 0 for the mean of the whole map, which has no parameters.

    Raises:
        ValueError: another extent.
    """

    below_one = ("extent",)  # options of which numbers below 1 mean something

    def __init__(self, channels: int, extent: int = 8) -> None:
        super().__init__()
        if extent != 0 and (extent < 2 or extent & (extent - 1)):
            raise ValueError(f"GE: extent should be 0 or a power of 2 from 2 on, not {extent}")
        self.gather = nn.Sequential()
        for _ in range(extent.bit_length() - 1 if extent else 0):
            if len(self.gather):
                self.gather.append(nn.ReLU())
            self.gather.append(nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False))
            self.gather.append(PooledBatchNorm2d(channels))

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """Weights of channels, and of pixels where the extent is not the whole map: (B, C, H, W) -> the same, or (B, C, 1, 1)."""
        if not len(self.gather):
            return torch.sigmoid(global_mean(x))
        return torch.sigmoid(F.interpolate(self.gather(x), size=x.shape[-2:], mode="nearest"))
