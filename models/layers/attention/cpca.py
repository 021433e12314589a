"""Channel prior convolutional attention: a channel gate, then a spatial gate of its own for every channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.shared import depthwise, global_max, global_mean
from models.spec import channel_rules as rules
from models.spec.registry import register

STRIPS = (7, 11, 21)


@register(
    "CPCA",
    channels=rules.same_width,
    kind="attention",
    paper="Channel prior convolutional attention for medical image segmentation, arXiv 2306.05196",
)
class CPCA(nn.Module):
    """y = x · σ(MLP(mean) + MLP(max)), then y · conv1x1(Σ strips of a depth-wise 5x5 of y) (equations 1 to 4 of the paper).

    Args:
        channels: channels in and out.
        reduction: the gate's hidden width is ``channels // reduction``, at least 1.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.near = depthwise(channels, 5)
        self.strips = nn.ModuleList(nn.Sequential(depthwise(channels, (1, k)), depthwise(channels, (k, 1))) for k in STRIPS)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x * torch.sigmoid(self._mlp(global_mean(x)) + self._mlp(global_max(x)))
        near = self.near(x)
        return x * self.mix(near + sum(strip(near) for strip in self.strips))

    def _mlp(self, pooled: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(pooled)))
