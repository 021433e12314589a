"""Convolutional block attention: a gate over channels, then a gate over pixels.

CBAM: Convolutional Block Attention Module, arXiv 1807.06521.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLinear
from models.layers.attention.ops.shared import channel_extremes, global_max, global_mean
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "CBAM: Convolutional Block Attention Module, arXiv 1807.06521"


@register("CBAM", channels=rules.same_width, kind="attention", paper=PAPER)
class CBAM(nn.Module):
    """Channel gate, then spatial gate (equations 1 to 3 of the paper).

    Args:
        gate_channels: channels in and out.
        reduction_ratio: the channel gate's hidden width is ``gate_channels // reduction_ratio``, at least 1.
        no_spatial: leave the spatial gate out.
    """

    def __init__(self, gate_channels: int, reduction_ratio: int = 16, no_spatial: bool = False) -> None:
        super().__init__()
        self.ChannelGate = ChannelGate(gate_channels, reduction_ratio)
        self.SpatialGate = nn.Identity() if no_spatial else SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.SpatialGate(self.ChannelGate(x))


class ChannelGate(nn.Module):
    """x · σ(MLP(mean) + MLP(max)), one MLP for both."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        # the published MLP flattens at place 0
        self.mlp = nn.Sequential(nn.Identity(), ChannelLinear(channels, hidden), nn.ReLU(), ChannelLinear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * torch.sigmoid(self.mlp(global_mean(x)) + self.mlp(global_max(x)))


class SpatialGate(nn.Module):
    """x · σ(BN(conv7x7([max, mean] over the channels)))."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Sequential()
        self.spatial.add_module("conv", nn.Conv2d(2, 1, 7, padding=3, bias=False))
        self.spatial.add_module("bn", nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * torch.sigmoid(self.spatial(torch.cat(channel_extremes(x), 1)))


@register("ChannelAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class ChannelAttention(nn.Module):
    """x · σ(W mean(x)): the single full-width layer that YOLOv8 has under this name.

    Args:
        channels: channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * torch.sigmoid(self.fc(global_mean(x)))


@register("SpatialAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class SpatialAttention(nn.Module):
    """x · σ(conv([mean, max] over the channels)), as YOLOv8 has it under this name.

    Args:
        channels: channels in and out; any number, because the gate has two input maps only.
        kernel_size: 3 or 7.
    """

    def __init__(self, channels: int | None = None, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size not in (3, 7):
            raise ValueError(f"SpatialAttention: kernel_size should be 3 or 7, not {kernel_size}")
        self.cv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        largest, mean = channel_extremes(x)
        return x * torch.sigmoid(self.cv1(torch.cat((mean, largest), 1)))
