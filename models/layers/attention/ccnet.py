"""Criss-cross attention: each pixel attends to its row and its column."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "CCNet: Criss-Cross Attention for Semantic Segmentation, arXiv 1811.11721"


@register("CrissCross", "CrissCrossAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class CrissCross(nn.Module):
    """x + γ Σ softmax(q · k) v over the H + W - 1 pixels of a pixel's row and column (equations 1 and 2 of the paper); no scale.

    The pixel itself counts once, in its row. γ starts at zero, so the module starts as the identity.

    Args:
        in_dim: channels in and out.
        reduction: query and key have ``in_dim // reduction`` channels, at least 1.
    """

    def __init__(self, in_dim: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(1, in_dim // reduction)
        self.query_conv = nn.Conv2d(in_dim, hidden, 1)
        self.key_conv = nn.Conv2d(in_dim, hidden, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        query, key, value = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        column_query, row_query = query.permute(0, 3, 2, 1), query.permute(0, 2, 3, 1)  # (B, W, H, c), (B, H, W, c)
        down = column_query @ key.permute(0, 3, 1, 2)  # (B, W, H, H)
        across = row_query @ key.permute(0, 2, 1, 3)  # (B, H, W, W)
        place = torch.arange(height, device=x.device)
        down = down.masked_fill(place[:, None] == place, float("-inf")).transpose(1, 2)  # (B, H, W, H)
        weights = torch.cat((down, across), 3).softmax(3).to(value.dtype)
        down, across = weights.split([height, width], 3)
        vertical = down.transpose(1, 2) @ value.permute(0, 3, 2, 1)  # (B, W, H, C)
        horizontal = across @ value.permute(0, 2, 3, 1)  # (B, H, W, C)
        return x + self.gamma * (vertical.permute(0, 3, 2, 1) + horizontal.permute(0, 3, 1, 2))
