"""Bottleneck attention: a channel branch and a dilated spatial branch, added, at a network's bottlenecks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLinear
from models.layers.attention.ops.shared import PooledBatchNorm2d, global_mean
from models.layers.explained import explain_gate
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("BAM", channels=rules.same_width, kind="attention", paper="BAM: Bottleneck Attention Module, arXiv 1807.06514")
class BAM(nn.Module):
    """x · (1 + σ(BN-MLP(mean(x)) + S(x))) (equations 1 to 4 of the paper).

    Parameter names are the published ones. The published code multiplies the branches where the paper adds them, and its pooling takes
    square maps only; here the branches are added, on any map. A batch of one pooled image is normalised with the running statistics.

    Args:
        gate_channel: channels in and out.
        reduction_ratio: both branches work at ``gate_channel // reduction_ratio`` channels, at least 1.
        dilation: of the two 3x3 convolutions of the spatial branch.
    """

    def __init__(self, gate_channel: int, reduction_ratio: int = 16, dilation: int = 4) -> None:
        super().__init__()
        hidden = max(1, gate_channel // reduction_ratio)
        self.channel_att = _ChannelBranch(gate_channel, hidden)
        self.spatial_att = _SpatialBranch(gate_channel, hidden, dilation)

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """Weights in 1-2: (B, C, H, W) -> the same."""
        return 1 + torch.sigmoid(self.channel_att(x) + self.spatial_att(x))


class _ChannelBranch(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gate_c = nn.Sequential()
        self.gate_c.add_module("gate_c_fc_0", ChannelLinear(channels, hidden))
        self.gate_c.add_module("gate_c_bn_1", PooledBatchNorm2d(hidden))
        self.gate_c.add_module("gate_c_relu_1", nn.ReLU())
        self.gate_c.add_module("gate_c_fc_final", ChannelLinear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 1, 1)."""
        return self.gate_c(global_mean(x))


class _SpatialBranch(nn.Module):
    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.gate_s = nn.Sequential()
        self.gate_s.add_module("gate_s_conv_reduce0", nn.Conv2d(channels, hidden, 1))
        self.gate_s.add_module("gate_s_bn_reduce0", nn.BatchNorm2d(hidden))
        self.gate_s.add_module("gate_s_relu_reduce0", nn.ReLU())
        for i in range(2):
            self.gate_s.add_module(f"gate_s_conv_di_{i}", nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation))
            self.gate_s.add_module(f"gate_s_bn_di_{i}", nn.BatchNorm2d(hidden))
            self.gate_s.add_module(f"gate_s_relu_di_{i}", nn.ReLU())
        self.gate_s.add_module("gate_s_conv_final", nn.Conv2d(hidden, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, H, W)."""
        return self.gate_s(x)
