"""BoTNet's last stage as a row: ResNet-50's c5 with self-attention in place of its 3x3 convolutions.

Bottleneck Transformers for Visual Recognition, arXiv 2101.11605 (table 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from models.layers.attention.botnet import PAPER, BoTPaperBlock
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("BoTNetStage", channels=rules.out_width_repeated, kind="backbone", paper=PAPER)
class BoTNetStage(nn.Module):
    """``n`` bottleneck transformer blocks, the first of which halves the map.

    Args:
        c1: channels in.
        c2: channels out (2048 in BoTNet-50).
        n: blocks (3 in BoTNet-50).
        stride: 2, or 1 to keep the size, as BoTNet does for detection with a stride of 16.
        fmap_size: height and width that the position tables are made for; they follow the map in use.
        block: further options of BoTPaperBlock.
    """

    def __init__(self, c1: int, c2: int, n: int = 3, stride: int = 2, *, fmap_size: Sequence[int] = (20, 20), **block: Any) -> None:
        super().__init__()
        first = BoTPaperBlock(c1, c2, fmap_size=fmap_size, downsample=stride == 2, **block)
        self.blocks = nn.Sequential(first, *(BoTPaperBlock(c2, c2, fmap_size=fmap_size, **block) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, H / stride, W / stride), rounded up."""
        return self.blocks(x)
