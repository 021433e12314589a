"""Spatial group-wise enhance: inside a group of channels, pixels like the group's mean are strengthened."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.shared import divisor_up_to, fold_groups, global_mean, unfold_groups
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Spatial Group-wise Enhance: Improving Semantic Feature Learning in Convolutional Networks, arXiv 1905.09646"


@register("SGE", "SpatialGroupEnhance", channels=rules.same_width, kind="attention", paper=PAPER)
class SGE(nn.Module):
    """x · σ(γ ĉ + β), ĉ the normalised similarity ⟨x, mean(x)⟩ of a pixel within its group (equations 1 to 5 of the paper).

    The variance is the biased one and ε stands under the root, so that a map of one pixel and a flat map have finite values and gradients.

    Args:
        channels: channels in and out.
        groups: number of groups, or the next smaller one that divides; the paper has 64 at widths of 256 and more.
    """

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        self.groups = divisor_up_to(channels, groups)
        self.weight = nn.Parameter(torch.zeros(1, self.groups, 1, 1))
        self.bias = nn.Parameter(torch.ones(1, self.groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        group = fold_groups(x, self.groups)  # (B G, C/G, H, W)
        similarity = (group * global_mean(group)).sum(1, keepdim=True)
        centred = similarity - global_mean(similarity)
        normed = centred * torch.rsqrt(global_mean(centred.square()) + 1e-5)
        gate = self.weight * unfold_groups(normed, self.groups) + self.bias  # (B, G, H, W)
        return unfold_groups(group * fold_groups(torch.sigmoid(gate), self.groups), self.groups)
