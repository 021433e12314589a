"""Cross stage partial blocks: one part of the channels goes through a stack of bottlenecks, the other around it.

Source: CSPNet, arXiv 1911.11929, and the forms that YOLOv5, v7, v8 and v9 made of it. Their parameter names are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers.conv import Activation, Conv, CrossConv, Size, make_activation
from models.layers.pooling import SPP
from models.layers.reparam import RepConvN
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("Bottleneck", channels=rules.out_width)
class Bottleneck(nn.Module):
    """Two convolutions with a residual where the widths allow it; (B, c1, H, W) to (B, c2, H, W).

    YOLOv8 and v9 have two 3×3 kernels; YOLOv5 and v7 have 1×1 and 3×3, which is ``k=(1, 3)``. Source: ResNet, arXiv 1512.03385.

    Attributes:
        dialect_defaults: options of rows that do not give them, by the dialect of their file.
    """

    dialect_defaults: ClassVar = {"v5": {"k": (1, 3)}}

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = 1, k: Sequence[Size] = (3, 3), e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, k[0])
        self.cv2 = Conv(hidden, c2, k[1], g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@register("RepNBottleneck", "RepBottleneck", channels=rules.out_width)
class RepNBottleneck(nn.Module):
    """A bottleneck whose first convolution is re-parameterised (YOLOv9, arXiv 2402.13616); (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = 1, k: Sequence[int] = (3, 3), e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = RepConvN(c1, hidden, k[0])
        self.cv2 = Conv(hidden, c2, k[1], g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@register("Res", channels=rules.out_width)
class Res(nn.Module):
    """ResNet's 1×1, 3×3, 1×1 bottleneck with a residual where the widths allow it (YOLOv7); (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1)
        self.cv2 = Conv(hidden, hidden, 3, g=g)
        self.cv3 = Conv(hidden, c2, 1)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv3(self.cv2(self.cv1(x)))
        return x + y if self.add else y


@register("C3", "BottleneckCSPA", channels=rules.out_width_repeated)
class C3(nn.Module):
    """CSP block with three convolutions around a stack of bottlenecks (YOLOv5); (B, c1, H, W) to (B, c2, H, W).

    Variants override :meth:`stack`, which builds the long path.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1)
        self.cv2 = Conv(c1, hidden, 1)
        self.cv3 = Conv(2 * hidden, c2, 1)
        self.m = self.stack(hidden, n, shortcut, g)

    def stack(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        """The long path: ``n`` blocks, (B, c, H, W) to the same shape."""
        return nn.Sequential(*(Bottleneck(c, c, shortcut, g, k=(1, 3), e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


@register("C3x", channels=rules.out_width_repeated)
class C3x(C3):
    """C3 with cross convolutions (YOLOv5). Shapes as for :class:`C3`."""

    def stack(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return nn.Sequential(*(CrossConv(c, c, 3, 1, g, 1.0, shortcut) for _ in range(n)))


@register("C3SPP", channels=rules.out_width)
class C3SPP(C3):
    """C3 with spatial pyramid pooling on the long path (YOLOv5). Shapes as for :class:`C3`."""

    def __init__(self, c1: int, c2: int, k: Sequence[int] = (5, 9, 13), e: float = 0.5) -> None:
        super().__init__(c1, c2, e=e)
        hidden = int(c2 * e)
        self.m = SPP(hidden, hidden, k)


@register("CSP", channels=rules.out_width_repeated)
class CSP(C3):
    """C3 with two 3×3 kernels in each bottleneck (YOLOv9). Shapes as for :class:`C3`."""

    def stack(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return nn.Sequential(*(Bottleneck(c, c, shortcut, g, e=1.0) for _ in range(n)))


@register("RepNCSP", "RepCSP", channels=rules.out_width_repeated)
class RepNCSP(C3):
    """C3 with re-parameterised bottlenecks (YOLOv9, arXiv 2402.13616). Shapes as for :class:`C3`."""

    def stack(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return nn.Sequential(*(RepNBottleneck(c, c, shortcut, g, e=1.0) for _ in range(n)))


@register("BottleneckCSP", channels=rules.out_width_repeated)
class BottleneckCSP(nn.Module):
    """CSP block with bare convolutions before a common batch norm (CSPNet, arXiv 1911.11929, fig. 3); (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        n: number of bottlenecks.
        shortcut: whether each bottleneck adds its input.
        g: groups of its second convolution.
        e: inner channels per output channel.
        k: kernels of each bottleneck: (3, 3) in YOLOv9, (1, 3) in YOLOv5.
        act: activation behind the common batch norm; LeakyReLU(0.1) in YOLOv5 up to release 5, whatever its convolutions have.
    """

    dialect_defaults: ClassVar = Bottleneck.dialect_defaults

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5, k: Sequence[Size] = (3, 3),
        act: Activation = True,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1)
        self.cv2 = nn.Conv2d(c1, hidden, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.cv4 = Conv(2 * hidden, c2, 1)
        self.bn = nn.BatchNorm2d(2 * hidden)
        self.act = make_activation(act)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, k, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        long = self.cv3(self.m(self.cv1(x)))
        return self.cv4(self.act(self.bn(torch.cat((long, self.cv2(x)), 1))))


@register("BottleneckCSPB", channels=rules.out_width_repeated)
class BottleneckCSPB(nn.Module):
    """CSP block that splits after its first convolution (YOLOv7, Scaled-YOLOv4's neck); (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = False, g: int = 1) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c2, 1)
        self.cv2 = Conv(c2, c2, 1)
        self.cv3 = Conv(2 * c2, c2, 1)
        self.m = nn.Sequential(*(Bottleneck(c2, c2, shortcut, g, k=(1, 3), e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv3(torch.cat((self.m(x), self.cv2(x)), 1))


@register("BottleneckCSPC", channels=rules.out_width_repeated)
class BottleneckCSPC(nn.Module):
    """CSP block with a fourth convolution after the bottlenecks (YOLOv7, Scaled-YOLOv4's backbone); (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1)
        self.cv2 = Conv(c1, hidden, 1)
        self.cv3 = Conv(hidden, hidden, 1)
        self.cv4 = Conv(2 * hidden, c2, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, k=(1, 3), e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv4(torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), 1))


@register("C2", channels=rules.out_width_repeated)
class C2(nn.Module):
    """CSP block with one convolution on each side (YOLOv8); (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        self.c = hidden = int(c2 * e)  # kept for classes that extend this one: published ones read it
        self.cv1 = Conv(c1, 2 * hidden, 1)
        self.cv2 = Conv(2 * hidden, c2, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat((self.m(a), b), 1))


class SplitAggregation(nn.Module):
    """A convolution, split in two; blocks in a row behind the second half; all maps joined by a convolution (after ELAN, arXiv 2211.04800).

    (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        n: number of blocks.
        e: inner channels per output channel.
        block: makes one, given its channels in and out.
    """

    def __init__(self, c1: int, c2: int, n: int, e: float, block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.c = hidden = int(c2 * e)  # kept for classes that extend this one: published ones read it
        self.cv1 = Conv(c1, 2 * hidden, 1)
        self.cv2 = Conv((2 + n) * hidden, c2, 1)
        self.m = nn.ModuleList(block(hidden) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


@register("C2f", channels=rules.out_width_repeated)
class C2f(SplitAggregation):
    """C2 that also passes on what every bottleneck gives (YOLOv8, after ELAN, arXiv 2211.04800); (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = False, g: int = 1, e: float = 0.5) -> None:
        super().__init__(c1, c2, n, e, lambda c: Bottleneck(c, c, shortcut, g, e=1.0))
