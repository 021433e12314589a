"""Context anchor attention: long strips of depth-wise convolution relate distant pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.shared import depthwise
from models.layers.conv import Conv
from models.layers.explained import explain_gate
from models.spec import channel_rules as rules
from models.spec.registry import register


@register(
    "CAA", channels=rules.same_width, kind="attention", paper="Poly Kernel Inception Network for Remote Sensing Detection, arXiv 2403.06258"
)
class CAA(nn.Module):
    """x · σ(conv1x1(column strip(row strip(conv1x1(mean7x7(x)))))) (equations 5 to 7 of the paper).

    Args:
        channels: channels in and out.
        kernel_size: length of the strips, odd; 11 plus twice the block's index in the paper.
    """

    def __init__(self, channels: int, kernel_size: int = 11) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels, act=nn.SiLU())
        self.h_conv = depthwise(channels, (1, kernel_size))
        self.v_conv = depthwise(channels, (kernel_size, 1))
        self.conv2 = Conv(channels, channels, act=nn.SiLU())

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """Weights of channels and pixels: (B, C, H, W) -> the same."""
        strips = self.v_conv(self.h_conv(self.conv1(F.avg_pool2d(x, 7, 1, 3))))
        return torch.sigmoid(self.conv2(strips))
