"""Polarized self-attention: high resolution kept in one direction while the other is collapsed.

Polarized Self-Attention: Towards High-quality Pixel-wise Regression, arXiv 2107.00782.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLayerNorm
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Polarized Self-Attention: Towards High-quality Pixel-wise Regression, arXiv 2107.00782"


class _Polarized(nn.Module):
    """The layers of both forms; the width inside is half of the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = max(1, channels // 2)
        self.ch_wv = nn.Conv2d(channels, half, 1)
        self.ch_wq = nn.Conv2d(channels, 1, 1)
        self.ch_wz = nn.Conv2d(half, channels, 1)
        self.ln = ChannelLayerNorm(channels)
        self.sp_wv = nn.Conv2d(channels, half, 1)
        self.sp_wq = nn.Conv2d(channels, half, 1)

    def channel_gate(self, x: Tensor) -> Tensor:
        """σ(LN(W_z (W_v x · softmax_pixels(W_q x)))), equation 3: (B, C, H, W) -> (B, C, 1, 1)."""
        value = self.ch_wv(x).flatten(2)  # (B, C/2, N)
        query = self.ch_wq(x).flatten(2).softmax(2).to(value.dtype)  # (B, 1, N)
        gathered = (value @ query.transpose(1, 2)).unsqueeze(3)  # (B, C/2, 1, 1)
        return torch.sigmoid(self.ln(self.ch_wz(gathered)))

    def spatial_gate(self, x: Tensor) -> Tensor:
        """σ(softmax_channels(mean(W_q x)) · W_v x), equation 4: (B, C, H, W) -> (B, 1, H, W)."""
        value = self.sp_wv(x)
        query = self.sp_wq(x).mean((2, 3), keepdim=True).softmax(1).to(value.dtype)  # (B, C/2, 1, 1)
        return torch.sigmoid((query * value).sum(1, keepdim=True))


@register("ParallelPolarizedSelfAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class ParallelPolarizedSelfAttention(_Polarized):
    """Channel-gated plus space-gated copy of x (equation 5 of the paper).

    Args:
        channels: channels in and out.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * (self.channel_gate(x) + self.spatial_gate(x))


@register("SequentialPolarizedSelfAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class SequentialPolarizedSelfAttention(_Polarized):
    """The space gate of the channel-gated x (equation 6 of the paper).

    Args:
        channels: channels in and out.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x * self.channel_gate(x)
        return x * self.spatial_gate(x)
