"""Large selective kernels: a soft selection, per pixel, between two receptive fields."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.shared import channel_extremes, depthwise
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Large Selective Kernel Network for Remote Sensing Object Detection, arXiv 2303.09030"


@register("LSK", "LSKBlock", channels=rules.same_width, kind="attention", paper=PAPER)
class LSK(nn.Module):
    """x · conv(σ₁ u₁ + σ₂ u₂): u₁ from a 5x5, u₂ from a dilated 7x7 behind it, σ chosen per pixel (equations 2 to 8 of the paper).

    Args:
        dim: channels in and out, even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = depthwise(dim, 5)
        self.conv_spatial = depthwise(dim, 7, dilation=3)
        self.conv1 = nn.Conv2d(dim, dim // 2, 1)
        self.conv2 = nn.Conv2d(dim, dim // 2, 1)
        self.conv_squeeze = nn.Conv2d(2, 2, 7, padding=3)
        self.conv = nn.Conv2d(dim // 2, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        near = self.conv0(x)
        far = self.conv2(self.conv_spatial(near))
        near = self.conv1(near)
        largest, mean = channel_extremes(torch.cat((near, far), 1))
        choice_near, choice_far = self.conv_squeeze(torch.cat((mean, largest), 1)).sigmoid().chunk(2, 1)
        return x * self.conv(near * choice_near + far * choice_far)
