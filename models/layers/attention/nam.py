"""Normalization-based attention: the scale of a batch norm is the importance of a channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import per_channel
from models.layers.explained import explain_gate
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("NAM", channels=rules.same_width, kind="attention", paper="NAM: Normalization-based Attention Module, arXiv 2111.12419")
class NAM(nn.Module):
    """x · σ(BN(x) · |γ| / Σ|γ|) (equation 2 of the paper), the channel part, as published.

    γ is the batch norm's scale; as in the published code it gets its gradient through the batch norm only, not through its share.

    Args:
        channels: channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.Channel_Att = _ChannelAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.Channel_Att(x)


class _ChannelAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(channels)

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """Weights of channels and pixels: (B, C, H, W) -> the same."""
        share = self.bn2.weight.detach().abs()
        return torch.sigmoid(self.bn2(x) * per_channel(share / share.sum()))
