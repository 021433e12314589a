"""Efficient channel attention: each channel's weight from its neighbours' means, by a one-dimensional convolution over channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.shared import adaptive_kernel
from models.layers.explained import explain_gate
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("ECA", channels=rules.same_width, kind="attention", paper="ECA-Net: Efficient Channel Attention for Deep CNNs, arXiv 1910.03151")
class ECA(nn.Module):
    """x · σ(conv1d(mean(x))) over the channels (equation 9 of the paper); no bias, as published.

    Args:
        channel: channels in and out.
        k_size: kernel over the channels, odd; None derives it from their number (equation 12).
    """

    def __init__(self, channel: int, k_size: int | None = None) -> None:
        super().__init__()
        kernel = adaptive_kernel(channel) if k_size is None else k_size
        self.conv = nn.Conv1d(1, 1, kernel, padding=(kernel - 1) // 2, bias=False)

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """The channels' weights: (B, C, H, W) -> (B, C, 1, 1)."""
        line = x.mean((2, 3)).unsqueeze(1)  # (B, 1, C)
        return torch.sigmoid(self.conv(line)).transpose(1, 2).unsqueeze(3)
