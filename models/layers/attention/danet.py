"""Dual attention: between pixels and between channels, side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import attend, full_precision
from models.layers.attention.ops.shared import conv_bn_relu
from models.spec import channel_rules as rules
from models.spec.registry import register


@register(
    "DANet",
    "DualAttention",
    channels=rules.same_width,
    kind="attention",
    paper="Dual Attention Network for Scene Segmentation, arXiv 1809.02983",
)
class DANet(nn.Module):
    """conv(position attention(x)) + conv(channel attention(x)) (equations 1 to 4 and section 3.4 of the paper).

    Positions: x + α Σ softmax(q · k) v without a matrix of pixels by pixels. Channels: x + β Σ softmax(x xᵀ) x; as in the published code
    the logits are turned over (softmax of max - logit), decided in float32. α and β start at zero.

    Args:
        channels: channels in and out.
        reduction: query and key have ``channels // reduction`` channels, at least 1.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.query_conv = nn.Conv2d(channels, hidden, 1)
        self.key_conv = nn.Conv2d(channels, hidden, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.beta = nn.Parameter(torch.zeros(1))
        self.position_out = conv_bn_relu(channels, channels, 3)
        self.channel_out = conv_bn_relu(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        by_position = attend(self.query_conv(x), self.key_conv(x), self.value_conv(x), scale=1.0)
        position = self.position_out(x + self.alpha * by_position)
        return position + self.channel_out(x + self.beta * _between_channels(x))


def _between_channels(x: Tensor) -> Tensor:
    """softmax(-x xᵀ) x over the channels: (B, C, H, W) -> (B, C, H, W)."""
    pixels = x.flatten(2)
    with full_precision(x):
        wide = pixels.float()
        weights = (wide @ -wide.transpose(1, 2)).softmax(2)
    return (weights.to(x.dtype) @ pixels).unflatten(2, x.shape[-2:])
