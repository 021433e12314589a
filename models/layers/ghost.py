"""Ghost blocks: half of the maps by a convolution, the other half from those by a cheap depth-wise one (GhostNet, arXiv 1911.11907)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.conv import Activation, Conv, DWConv
from models.layers.csp import C3
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("GhostConv", channels=rules.out_width)
class GhostConv(nn.Module):
    """Ghost module (arXiv 1911.11907, fig. 1b) with a 5×5 cheap operation; (B, c1, H, W) to (B, c2, ceil(H/s), ceil(W/s))."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: Activation = True) -> None:
        super().__init__()
        hidden = c2 // 2
        self.cv1 = Conv(c1, hidden, k, s, g=g, act=act)
        self.cv2 = Conv(hidden, hidden, 5, g=hidden, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


@register("GhostBottleneck", "Ghost", channels=rules.out_width)
class GhostBottleneck(nn.Module):
    """Two ghost modules with a residual (arXiv 1911.11907, fig. 3); (B, c1, H, W) to (B, c2, H/s, W/s), s = 1 or 2, c1 = c2 where s = 1."""

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1) -> None:
        super().__init__()
        hidden = c2 // 2
        halve = s == 2
        self.conv = nn.Sequential(
            GhostConv(c1, hidden),
            DWConv(hidden, hidden, k, s, act=False) if halve else nn.Identity(),
            GhostConv(hidden, c2, act=False),
        )
        self.shortcut = (
            nn.Sequential(DWConv(c1, c1, k, s, act=False), Conv(c1, c2, 1, act=False)) if halve else nn.Identity()
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


@register("C3Ghost", channels=rules.out_width_repeated)
class C3Ghost(C3):
    """C3 with ghost bottlenecks (YOLOv5); (B, c1, H, W) to (B, c2, H, W)."""

    def stack(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return nn.Sequential(*(GhostBottleneck(c, c) for _ in range(n)))
