"""ParNet's attention block: a skip-squeeze-and-excitation beside a 1x1 and a 3x3 convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.shared import global_mean
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("ParNetAttention", channels=rules.same_width, kind="attention", paper="Non-deep Networks, arXiv 2110.07641")
class ParNetAttention(nn.Module):
    """SiLU(BN(conv1x1(x)) + BN(conv3x3(x)) + x · σ(W mean(x))) (section 3.1 and figure 2 of the paper).

    Args:
        channel: channels in and out.
    """

    def __init__(self, channel: int) -> None:
        super().__init__()
        # the published branch pools at place 0
        self.sse = nn.Sequential(nn.Identity(), nn.Conv2d(channel, channel, 1))
        self.conv1x1 = nn.Sequential(nn.Conv2d(channel, channel, 1), nn.BatchNorm2d(channel))
        self.conv3x3 = nn.Sequential(nn.Conv2d(channel, channel, 3, padding=1), nn.BatchNorm2d(channel))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return F.silu(self.conv1x1(x) + self.conv3x3(x) + x * torch.sigmoid(self.sse(global_mean(x))))
