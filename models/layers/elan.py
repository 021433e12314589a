"""Efficient layer aggregation: a short path, a long path, and every stage of the long one joined in a single concatenation.

Sources: ELAN, arXiv 2211.04800; YOLOv9's GELAN, arXiv 2402.13616, fig. 4, which allows any block on the long path.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.conv import Conv
from models.layers.csp import RepNCSP
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("ELAN1", channels=rules.out_width)
class ELAN1(nn.Module):
    """ELAN with two 3×3 convolutions on the long path (YOLOv9-t and -s); (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        c3: width after the first convolution; half of it enters the long path.
        c4: width of each stage of the long path.
    """

    def __init__(self, c1: int, c2: int, c3: int, c4: int) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c3, 1)
        self.cv2 = self.stage(c3 // 2, c4)
        self.cv3 = self.stage(c4, c4)
        self.cv4 = Conv(c3 + 2 * c4, c2, 1)

    def stage(self, c1: int, c2: int) -> nn.Module:
        """One stage of the long path, (B, c1, H, W) to (B, c2, H, W)."""
        return Conv(c1, c2, 3)

    def forward(self, x: Tensor) -> Tensor:
        short, start = self.cv1(x).chunk(2, 1)
        first = self.cv2(start)
        return self.cv4(torch.cat((short, start, first, self.cv3(first)), 1))


@register("RepNCSPELAN4", channels=rules.out_width)
class RepNCSPELAN4(ELAN1):
    """GELAN: ELAN with a re-parameterised CSP block and a 3×3 convolution in each stage (YOLOv9, arXiv 2402.13616, fig. 4c).

    (B, c1, H, W) to (B, c2, H, W); c1 to c4 as for :class:`ELAN1`, ``c5`` bottlenecks in each CSP block.
    """

    def __init__(self, c1: int, c2: int, c3: int, c4: int, c5: int = 1) -> None:
        self.depth = c5
        super().__init__(c1, c2, c3, c4)

    def stage(self, c1: int, c2: int) -> nn.Module:
        return nn.Sequential(RepNCSP(c1, c2, self.depth), Conv(c2, c2, 3))
