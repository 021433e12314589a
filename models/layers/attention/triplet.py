"""Triplet attention: a gate for each pair of dimensions of a map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.shared import channel_extremes
from models.spec import channel_rules as rules
from models.spec.registry import register


@register(
    "TripletAttention",
    channels=rules.same_width,
    kind="attention",
    paper="Rotate to Attend: Convolutional Triplet Attention Module, arXiv 2010.03045",
)
class TripletAttention(nn.Module):
    """The mean of three gated copies: over (C, W), over (H, C) and over (H, W) (equations 1 and 2 of the paper).

    Args:
        channels: channels in and out; any number.
        no_spatial: leave the (H, W) gate out.
    """

    def __init__(self, channels: int | None = None, no_spatial: bool = False) -> None:
        super().__init__()
        self.cw = _Gate()
        self.hc = _Gate()
        self.hw = None if no_spatial else _Gate()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        channel_column = self.cw(x, 2).transpose(1, 2)  # over (C, W), then (B, C, 1, W)
        channel_row = self.hc(x, 3).transpose(1, 3)  # over (H, C), then (B, C, H, 1)
        if self.hw is None:
            return x * (channel_column + channel_row) / 2
        return x * (channel_column + channel_row + self.hw(x, 1)) / 3


class _Gate(nn.Module):
    """σ(BN(conv7x7([max, mean] over one dimension)))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        self.conv.add_module("conv", nn.Conv2d(2, 1, 7, padding=3, bias=False))
        self.conv.add_module("bn", nn.BatchNorm2d(1, momentum=0.01))

    def forward(self, x: Tensor, dim: int) -> Tensor:
        """(B, C, H, W) -> (B, 1, C, W) for dim 2, (B, 1, H, C) for dim 3, (B, 1, H, W) for dim 1."""
        pooled = torch.cat(channel_extremes(x, dim), dim)
        return torch.sigmoid(self.conv(pooled.transpose(1, dim)))
