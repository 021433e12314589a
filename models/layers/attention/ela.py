"""Efficient local attention: row and column means, each filtered by a one-dimensional convolution and a group norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.shared import divisor_up_to
from models.layers.explained import Query, View, gate_views
from models.spec import channel_rules as rules
from models.spec.registry import register


@register(
    "ELA",
    channels=rules.same_width,
    kind="attention",
    paper="ELA: Efficient Local Attention for Deep Convolutional Neural Networks, arXiv 2403.01123",
)
class ELA(nn.Module):
    """x · σ(GN(conv(rows))) · σ(GN(conv(columns))), one convolution and norm for both (equations 5 to 8 of the paper); ELA-B by default.

    Args:
        channels: channels in and out.
        kernel_size: along the strip, odd: 5 in ELA-T and -S, 7 in ELA-B and -L.
        num_groups: of the group norm, or the next smaller number that divides: 32 in ELA-T, else 16.
        depthwise: one convolution a channel (ELA-T and -B); False for groups of 8 channels (ELA-S and -L).
    """

    def __init__(self, channels: int, kernel_size: int = 7, num_groups: int = 16, depthwise: bool = True) -> None:
        super().__init__()
        groups = channels if depthwise else channels // divisor_up_to(channels, 8)
        self.conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.gn = nn.GroupNorm(divisor_up_to(channels, num_groups), channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self._strip(x.mean(3)).unsqueeze(3) * self._strip(x.mean(2)).unsqueeze(2)

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """Both strips together."""
        return gate_views(self._strip(x.mean(3)).unsqueeze(3) * self._strip(x.mean(2)).unsqueeze(2))

    def _strip(self, line: Tensor) -> Tensor:
        """(B, C, length) -> (B, C, length)."""
        return torch.sigmoid(self.gn(self.conv(line)))
