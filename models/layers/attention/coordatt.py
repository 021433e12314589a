"""Coordinate attention: a weight for each row and each column of a channel, so that position survives the pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.explained import Query, View, gate_views
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Coordinate Attention for Efficient Mobile Network Design, arXiv 2103.02907"


@register("CoordAtt", "CoordAttention", "CA", channels=rules.same_width, kind="attention", paper=PAPER)
class CoordAtt(nn.Module):
    """x · σ(F_h) · σ(F_w): row and column means share one convolution and batch norm (equations 4 to 8 of the paper).

    Args:
        inp: channels in and out.
        reduction: hidden width ``inp // reduction``, at least 8.
        oup: the published module's output width; equal to ``inp`` if given.

    Raises:
        ValueError: ``oup`` differs from ``inp``.
    """

    def __init__(self, inp: int, reduction: int = 32, oup: int | None = None) -> None:
        super().__init__()
        if oup not in (None, inp):
            raise ValueError(f"CoordAtt keeps its width: oup {oup} should be {inp}")
        hidden = max(8, inp // reduction)
        self.conv1 = nn.Conv2d(inp, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv_h = nn.Conv2d(hidden, inp, 1)
        self.conv_w = nn.Conv2d(hidden, inp, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        rows, columns = self._strips(x)
        return x * columns * rows

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """Both strips together."""
        rows, columns = self._strips(x)
        return gate_views(rows * columns)

    def _strips(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the rows (B, C, H, 1) and of the columns (B, C, 1, W)."""
        height, width = x.shape[-2:]
        means = torch.cat((x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)), 2)  # (B, C, H + W, 1)
        hidden = F.hardswish(self.bn1(self.conv1(means)))
        rows, columns = hidden.split([height, width], 2)
        return self.conv_h(rows).sigmoid(), self.conv_w(columns.transpose(2, 3)).sigmoid()
