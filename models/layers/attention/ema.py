"""Efficient multi-scale attention: groups of channels, weighted by row and column means and by a 3x3 view of the same group."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.shared import divisor_up_to, fold_groups, global_mean, unfold_groups
from models.spec import channel_rules as rules
from models.spec.registry import register


@register(
    "EMA",
    "EMAttention",
    channels=rules.same_width,
    kind="attention",
    paper="Efficient Multi-Scale Attention Module with Cross-Spatial Learning, arXiv 2305.13563",
)
class EMA(nn.Module):
    """Cross-spatial learning in groups of channels (figure 3 and section III of the paper).

    Within a group g: a = GroupNorm(g · σ(h) · σ(w)) with h, w one shared 1x1 convolution of the row and column means, b = conv3x3(g), and
    the output is g · σ(⟨softmax(mean a), b⟩ + ⟨softmax(mean b), a⟩), products over channels.

    The published module fails where ``factor`` does not divide the channels; here the number of groups is the largest divisor of the
    channels that is not above it.

    Args:
        channels: channels in and out.
        factor: number of groups.
        c2: the published module's second argument; equal to ``channels`` if given.

    Raises:
        ValueError: ``c2`` differs from ``channels``.
    """

    def __init__(self, channels: int, factor: int = 32, c2: int | None = None) -> None:
        super().__init__()
        if c2 not in (None, channels):
            raise ValueError(f"EMA keeps its width: c2 {c2} should be {channels}")
        self.groups = divisor_up_to(channels, factor)
        width = channels // self.groups
        self.gn = nn.GroupNorm(width, width)
        self.conv1x1 = nn.Conv2d(width, width, 1)
        self.conv3x3 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        group = fold_groups(x, self.groups)  # (B G, C/G, H, W)
        rows = self.conv1x1(group.mean(3, keepdim=True))  # (B G, C/G, H, 1)
        columns = self.conv1x1(group.mean(2, keepdim=True))  # (B G, C/G, 1, W)
        first = self.gn(group * rows.sigmoid() * columns.sigmoid())
        second = self.conv3x3(group)
        weights = _cross_spatial_weight(first, second) + _cross_spatial_weight(second, first)
        return unfold_groups(group * torch.sigmoid(weights), self.groups)


def _cross_spatial_weight(pooled: Tensor, other: Tensor) -> Tensor:
    """Mean of ``other`` over channels, weighted by the softmax of the means of ``pooled``: -> (B, 1, H, W)."""
    return (global_mean(pooled).softmax(1) * other).sum(1, keepdim=True)
