"""Bidirectional feature pyramid: levels are fused top down and bottom up, with one learned non-negative weight per input.

EfficientDet: Scalable and Efficient Object Detection, arXiv 1911.09070.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.whole import listed_by_stage
from models.layers.attention.ops.common import weighted_sum
from models.layers.attention.ops.shared import depthwise
from models.necks.blending import blends
from models.spec.registry import register

EPS = 1e-4  # in the sum of the weights
PAPER = "EfficientDet: Scalable and Efficient Object Detection, arXiv 1911.09070"


@register("BiFPN", "BiFPNNode", channels=blends, kind="neck", paper=PAPER)
class BiFPNNode(nn.Module):
    """BN(conv1x1(depth-wise 3x3(SiLU(Σ wᵢ xᵢ / (ε + Σ wᵢ))))), w = ReLU of the parameters: fast normalised fusion (section 3.3).

    One node of the pyramid: a neck is a few such rows.

    Args:
        channels: channels of each input and out.
        inputs: number of inputs.
    """

    def __init__(self, channels: int, inputs: int = 2) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(inputs))
        self.conv = SeparableConv(channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Each (B, C, H, W) -> (B, C, H, W)."""
        return self.conv(F.silu(fast_fusion(maps, self.w)))


class SeparableConv(nn.Module):
    """Depth-wise 3x3, pointwise, batch norm, under the published names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise_conv = _named(depthwise(channels, 3, bias=False))
        self.pointwise_conv = _named(nn.Conv2d(channels, channels, 1))
        self.bn = nn.BatchNorm2d(channels, momentum=0.01, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pointwise_conv(self.depthwise_conv(x)))


@register("BiFPNLayer", channels=listed_by_stage("yolov8-BiFPN.yaml"), kind="neck", paper=PAPER)
class BiFPNLayer(nn.Module):
    """One layer of EfficientDet's pyramid over five levels, P3 to P7 (figure 2d of the paper), under the published names.

    Any sizes, as long as each level is half (rounded up) of the one before.

    Args:
        num_channels: channels of every level.
        conv_channels: widths of a backbone's levels; only with ``first_time``.
        first_time: must be False: the lateral layers of a pyramid's first layer are rows of their own here.

    Raises:
        ValueError: ``first_time``.
    """

    def __init__(self, num_channels: int = 64, conv_channels: Sequence[int] = (), first_time: bool = False) -> None:
        super().__init__()
        if first_time:
            raise ValueError("BiFPNLayer: first_time adds lateral layers; write them as Conv rows")
        for level in (6, 5, 4, 3):
            self.register_parameter(f"p{level}_w1", nn.Parameter(torch.ones(2)))
            self.add_module(f"conv{level}_up", SeparableConv(num_channels))
        for level in (4, 5, 6, 7):
            self.register_parameter(f"p{level}_w2", nn.Parameter(torch.ones(3 if level < 7 else 2)))
            self.add_module(f"conv{level}_down", SeparableConv(num_channels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """P3 to P7, each (B, C, H, W) -> the same shapes."""
        given = dict(zip(range(3, 8), maps))
        up = {7: given[7]}
        for level in (6, 5, 4, 3):
            coarse = F.interpolate(up[level + 1], size=given[level].shape[-2:], mode="nearest")
            up[level] = self._node(level, 1, (given[level], coarse))
        out = {3: up[3]}
        for level in (4, 5, 6, 7):
            finer = halve(out[level - 1])
            inputs = (given[level], up[level], finer) if level < 7 else (given[level], finer)
            out[level] = self._node(level, 2, inputs)
        return list(out.values())

    def _node(self, level: int, way: int, inputs: Sequence[Tensor]) -> Tensor:
        conv = getattr(self, f"conv{level}_{'up' if way == 1 else 'down'}")
        return conv(F.silu(fast_fusion(inputs, getattr(self, f"p{level}_w{way}"))))


def fast_fusion(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ wᵢ xᵢ / (ε + Σ wᵢ), w = ReLU(weights)."""
    weights = F.relu(weights)
    shares = (weights / (weights.sum() + EPS)).to(maps[0].dtype)
    return weighted_sum(maps, shares.unbind(0))


def halve(x: Tensor) -> Tensor:
    """Max pool 3x3 of stride 2 that centres on the first pixel of each pair: (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)).

    Pads zeros at the bottom and right, as in the published code; one more where the size is even.
    """
    height, width = x.shape[-2:]
    left, above = width % 2, height % 2  # odd sizes are padded on both sides, even ones at the end only
    return F.max_pool2d(F.pad(x, (left, 1, above, 1)), 3, 2)


def _named(conv: nn.Conv2d) -> nn.Sequential:
    layers = nn.Sequential()
    layers.add_module("conv", conv)
    return layers
