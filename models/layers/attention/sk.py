"""Selective kernels: a soft selection, per channel, between branches with different receptive fields."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLinear, weighted_sum
from models.layers.attention.ops.shared import PooledBatchNorm2d, divisor_up_to, global_mean
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("SK", channels=rules.same_width, kind="attention", paper="Selective Kernel Networks, arXiv 1903.06586")
class SK(nn.Module):
    """Split, fuse, select (equations 1 to 6 of the paper): Σ aᵢ · ReLU(BN(Uᵢ(x))), a = softmax over branches of Wᵢ ReLU(BN(W mean(Σ U))).

    As in the paper, a kernel of 5 is a 3x3 with dilation 2, branches are grouped and the fusing layer has a batch norm and ReLU; forks
    of it that circulate have none of the three.

    Args:
        channel: channels in and out.
        kernels: field of each branch, odd (px).
        reduction: the fusing width is ``channel // reduction`` …
        group: groups of the branches; the largest divisor of the channels that is not above it.
        L: … but at least this.

    Raises:
        ValueError: a field that no dilated 3x3 has.
    """

    def __init__(self, channel: int, kernels: Sequence[int] = (3, 5), reduction: int = 16, group: int = 32, L: int = 32) -> None:
        super().__init__()
        if not kernels or any(kernel < 3 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"SK: kernels {list(kernels)} should be odd, from 3 on, since each is a dilated 3x3")
        groups = divisor_up_to(channel, group)
        hidden = max(L, channel // reduction)
        self.convs = nn.ModuleList(_branch(channel, kernel // 2, groups) for kernel in kernels)
        self.fc = nn.Sequential(ChannelLinear(channel, hidden, bias=False), PooledBatchNorm2d(hidden), nn.ReLU())
        self.fcs = nn.ModuleList(ChannelLinear(hidden, channel) for _ in kernels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        branches = [conv(x) for conv in self.convs]
        fused = self.fc(global_mean(sum(branches)))
        choice = torch.stack([fc(fused) for fc in self.fcs]).softmax(0)  # (branches, B, C, 1, 1)
        return weighted_sum(branches, choice.to(x.dtype).unbind(0))


def _branch(channels: int, dilation: int, groups: int) -> nn.Sequential:
    layers = nn.Sequential()
    layers.add_module("conv", nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=groups, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(channels))
    layers.add_module("relu", nn.ReLU())
    return layers
