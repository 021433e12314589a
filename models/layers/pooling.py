"""Pooling: spatial pyramids, and the blocks that halve a map by pooling and convolution together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.conv import Activation, Conv
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("MP", channels=rules.keep_width)
class MP(nn.MaxPool2d):
    """Max-pooling by ``k`` (YOLOv7); (B, C, H, W) to (B, C, H // k, W // k)."""

    def __init__(self, k: int = 2) -> None:
        super().__init__(k, k)


@register("SP", channels=rules.keep_width)
class SP(nn.MaxPool2d):
    """Max-pooling that keeps the size at stride 1 (YOLOv7); (B, C, H, W) to (B, C, ceil(H/s), ceil(W/s))."""

    def __init__(self, k: int = 3, s: int = 1) -> None:
        super().__init__(k, s, k // 2)


@register("SPP", channels=rules.out_width)
class SPP(nn.Module):
    """Spatial pyramid pooling with kernels ``k`` side by side (arXiv 1406.4729, as YOLOv3-SPP has it); (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, k: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden, 1)
        self.cv2 = Conv(hidden * (len(k) + 1), c2, 1)
        self.m = nn.ModuleList(SP(x) for x in k)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


@register("SPPF", channels=rules.out_width)
class SPPF(nn.Module):
    """SPP as poolings in a row, three of them equal to kernels k, 2k − 1 and 3k − 2 side by side (YOLOv5); (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        k: kernel of each pooling, odd.
        n: number of poolings.
        shortcut: add the input where the widths are equal (YOLO26).
        act: activation after the first convolution. A row that gives ``n`` by place, as YOLO26's do, means none.
    """

    def __init__(self, c1: int, c2: int, k: int = 5, n: int = 3, shortcut: bool = False, act: Activation = True) -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden, 1, act=act)
        self.cv2 = Conv(hidden * (n + 1), c2, 1)
        self.m = SP(k)
        self.poolings = n
        self.add = shortcut and c1 == c2

    @classmethod
    def row_options(cls, placed: Mapping[str, Any], scale: str) -> dict[str, Any]:
        """No activation in rows of the newer form."""
        return {"act": False} if "n" in placed else {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(torch.cat(pooled_in_a_row(self.cv1(x), (self.m,) * self.poolings), 1))
        return x + y if self.add else y


@register("SPPELAN", channels=rules.out_width)
class SPPELAN(nn.Module):
    """SPPF whose inner width ``c3`` is free (YOLOv9, arXiv 2402.13616); (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, c3: int, k: int = 5) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c3, 1)
        self.cv2, self.cv3, self.cv4 = SP(k), SP(k), SP(k)
        self.cv5 = Conv(4 * c3, c2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv5(torch.cat(pooled_in_a_row(self.cv1(x), (self.cv2, self.cv3, self.cv4)), 1))


@register("SPPCSPC", channels=rules.out_width)
class SPPCSPC(nn.Module):
    """SPP on the long path of a CSP block (YOLOv7, arXiv 2207.02696, after Scaled-YOLOv4); (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, e: float = 0.5, k: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        hidden = int(2 * c2 * e)
        self.cv1 = Conv(c1, hidden, 1)
        self.cv2 = Conv(c1, hidden, 1)
        self.cv3 = Conv(hidden, hidden, 3)
        self.cv4 = Conv(hidden, hidden, 1)
        self.m = nn.ModuleList(SP(x) for x in k)
        self.cv5 = Conv((len(k) + 1) * hidden, hidden, 1)
        self.cv6 = Conv(hidden, hidden, 3)
        self.cv7 = Conv(2 * hidden, c2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv4(self.cv3(self.cv1(x)))
        y = self.cv6(self.cv5(torch.cat([y, *(pool(y) for pool in self.m)], 1)))
        return self.cv7(torch.cat((y, self.cv2(x)), 1))


@register("AConv", channels=rules.out_width)
class AConv(nn.Module):
    """Average over 2×2, then a 3×3 convolution of stride 2 (YOLOv9); (B, c1, H, W) to (B, c2, H // 2, W // 2)."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c2, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv1(F.avg_pool2d(x, 2, 1))


@register("ADown", channels=rules.out_width)
class ADown(nn.Module):
    """Average over 2×2, then half the channels by a 3×3 convolution and half by max-pooling and 1×1 (YOLOv9).

    (B, c1, H, W) to (B, c2, H // 2, W // 2).
    """

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.cv1 = Conv(c1 // 2, c2 // 2, 3, 2, 1)
        self.cv2 = Conv(c1 // 2, c2 // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.avg_pool2d(x, 2, 1).chunk(2, 1)
        return torch.cat((self.cv1(a), self.cv2(F.max_pool2d(b, 3, 2, 1))), 1)


@register("DownC", channels=rules.out_width)
class DownC(nn.Module):
    """Half the channels by a strided convolution, half by max-pooling (YOLOv7-E6, arXiv 2207.02696); (B, c1, H, W) to (B, c2, H/k, W/k)."""

    def __init__(self, c1: int, c2: int, k: int = 2) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c1, 1)
        self.cv2 = Conv(c1, c2 // 2, 3, k)
        self.cv3 = Conv(c1, c2 // 2, 1)
        self.mp = MP(k)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.cv2(self.cv1(x)), self.cv3(self.mp(x))), 1)


@register("Stem", channels=rules.out_width)
class Stem(nn.Module):
    """PeleeNet's stem (arXiv 1804.06882, fig. 2) as YOLOv7 has it; (B, c1, H, W) to (B, c2, H / 4, W / 4)."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        hidden = c2 // 2
        self.cv1 = Conv(c1, hidden, 3, 2)
        self.cv2 = Conv(hidden, hidden, 1)
        self.cv3 = Conv(hidden, hidden, 3, 2)
        self.pool = MP(2)
        self.cv4 = Conv(2 * hidden, c2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv4(torch.cat((self.cv3(self.cv2(x)), self.pool(x)), 1))


def pooled_in_a_row(x: Tensor, pools: Sequence[nn.Module]) -> list[Tensor]:
    """``x`` and the output of each pooling of the previous one."""
    maps = [x]
    for pool in pools:
        maps.append(pool(maps[-1]))
    return maps
