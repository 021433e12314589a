"""Shuffle attention: half of each group gets a channel gate, half a spatial gate, and the groups mix by a shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.attention.ops.shared import channel_shuffle, divisor_up_to, fold_groups, global_mean, unfold_groups
from models.spec import channel_rules as rules
from models.spec.registry import register


@register(
    "ShuffleAttention", channels=rules.same_width, kind="attention", paper="SA-Net: Shuffle Attention for Deep CNNs, arXiv 2102.00240"
)
class ShuffleAttention(nn.Module):
    """x₁ · σ(w₁ mean(x₁) + b₁) and x₂ · σ(w₂ GN(x₂) + b₂) in every group (equations 1 to 3 of the paper).

    Where 2 G does not divide the channels, the largest smaller number of groups that does is used.

    Args:
        channel: channels in and out, even.
        G: number of groups; all share their parameters.
    """

    def __init__(self, channel: int, G: int = 8) -> None:
        super().__init__()
        self.groups = divisor_up_to(channel // 2, G)
        half = channel // (2 * self.groups)
        self.cweight = nn.Parameter(torch.zeros(1, half, 1, 1))
        self.cbias = nn.Parameter(torch.ones(1, half, 1, 1))
        self.sweight = nn.Parameter(torch.zeros(1, half, 1, 1))
        self.sbias = nn.Parameter(torch.ones(1, half, 1, 1))
        self.gn = nn.GroupNorm(half, half)

    @staticmethod
    def read_row(options: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``[16, 8]`` has a reduction in front of the groups, which nothing uses, as in the rows of other programs."""
        return tuple(options[1:] if len(options) == 2 and all(type(option) is int for option in options) else options), {}

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        by_channel, by_place = fold_groups(x, self.groups).chunk(2, 1)  # each (B G, C / 2G, H, W)
        by_channel = by_channel * torch.sigmoid(self.cweight * global_mean(by_channel) + self.cbias)
        by_place = by_place * torch.sigmoid(self.sweight * self.gn(by_place) + self.sbias)
        return channel_shuffle(unfold_groups(torch.cat((by_channel, by_place), 1), self.groups), 2)
