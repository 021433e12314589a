"""Multi-scale convolutional attention: strips of three lengths beside a small kernel, used as a gate.

SegNeXt: Rethinking Convolutional Attention Design for Semantic Segmentation, arXiv 2209.08575.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import DropPath, per_channel
from models.layers.attention.ops.shared import GatedResidual, depthwise
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "SegNeXt: Rethinking Convolutional Attention Design for Semantic Segmentation, arXiv 2209.08575"


@register("MSCA", channels=rules.same_width, kind="attention", paper=PAPER)
class MSCA(nn.Module):
    """x · conv1x1(Σ scales of a depth-wise 5x5) (equations 1 and 2 of the paper): identity and strips of 7, 11 and 21 px.

    Args:
        dim: channels in and out.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = depthwise(dim, 5)
        self.conv0_1, self.conv0_2 = depthwise(dim, (1, 7)), depthwise(dim, (7, 1))
        self.conv1_1, self.conv1_2 = depthwise(dim, (1, 11)), depthwise(dim, (11, 1))
        self.conv2_1, self.conv2_2 = depthwise(dim, (1, 21)), depthwise(dim, (21, 1))
        self.conv3 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        near = self.conv0(x)
        strips = self.conv0_2(self.conv0_1(near)) + self.conv1_2(self.conv1_1(near)) + self.conv2_2(self.conv2_1(near))
        return x * self.conv3(near + strips)


@register("MSCASpatialAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class MSCASpatialAttention(GatedResidual):
    """MSCA between two pointwise convolutions, with a residual.

    Args:
        d_model: channels in and out.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, MSCA(d_model))


@register("MSCANBlock", channels=rules.same_width, kind="attention", paper=PAPER)
class MSCANBlock(nn.Module):
    """SegNeXt's block: x + γ₁ · attention(BN(x)), then x + γ₂ · MLP(BN(x)), on maps.

    Args:
        dim: channels in and out.
        mlp_ratio: hidden width of the MLP, in multiples of ``dim``.
        drop: dropout in the MLP.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0, drop: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = MSCASpatialAttention(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = _ConvMlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.drop_path(per_channel(self.layer_scale_1) * self.attn(self.norm1(x)))
        return x + self.drop_path(per_channel(self.layer_scale_2) * self.mlp(self.norm2(x)))


class _ConvMlp(nn.Module):
    """Pointwise, depth-wise 3x3, GELU, pointwise."""

    def __init__(self, channels: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv = nn.Sequential()
        self.dwconv.add_module("dwconv", depthwise(hidden, 3))
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.dwconv(self.fc1(x))))))
