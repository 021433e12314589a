"""Global attention: an MLP over channels at every pixel, then two wide convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLinear
from models.layers.attention.ops.shared import channel_shuffle, divisor_up_to
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Global Attention Mechanism: Retain Information to Enhance Channel-Spatial Interactions, arXiv 2112.05561"


@register("GAM", channels=rules.same_width, kind="attention", paper=PAPER)
class GAM(nn.Module):
    """y = x · MLP(x) per pixel, then y · σ(shuffle(conv7x7(conv7x7(y)))) (equations 1 and 2 of the paper).

    As published, the channel part has no sigmoid, and the groups of the two convolutions are shuffled.

    Args:
        c1: channels in and out.
        group: convolutions in ``rate`` groups, or the next smaller number that divides.
        rate: hidden width is ``c1 // rate``; also the number of groups.
        c2: the published module's output width; equal to ``c1`` if given.

    Raises:
        ValueError: ``c2`` differs from ``c1``, or the channels do not fit the groups.
    """

    def __init__(self, c1: int, group: bool = True, rate: int = 4, c2: int | None = None) -> None:
        super().__init__()
        hidden = c1 // rate
        groups = divisor_up_to(max(1, hidden), rate) if group else 1
        if c2 not in (None, c1):
            raise ValueError(f"GAM keeps its width: c2 {c2} should be {c1}")
        if c1 % 4 or c1 % groups or hidden < 1:
            raise ValueError(f"GAM: {c1} channels do not divide by 4 and, at rate {rate}, into {groups} groups")
        self.channel_attention = nn.Sequential(ChannelLinear(c1, hidden), nn.ReLU(), ChannelLinear(hidden, c1))
        self.spatial_attention = nn.Sequential(
            nn.Conv2d(c1, hidden, 7, padding=3, groups=groups),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, c1, 7, padding=3, groups=groups),
            nn.BatchNorm2d(c1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x * self.channel_attention(x)
        return x * torch.sigmoid(channel_shuffle(self.spatial_attention(x), 4))
