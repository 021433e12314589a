"""YOLOv7's CSP blocks around other bottlenecks: ResNet's, ResNeXt's and ghost ones. Their parameter names are kept.

Source: YOLOv7 (arXiv 2207.02696), whose r50-csp and x50-csp networks are made of them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models.layers.csp import C3, BottleneckCSPB, BottleneckCSPC, Res
from models.layers.ghost import GhostBottleneck
from models.spec import channel_rules as rules
from models.spec.registry import register

RESNEXT_GROUPS = 32


@register("ResX", channels=rules.out_width)
class ResX(Res):
    """ResNeXt's bottleneck: a grouped 3×3 convolution (arXiv 1611.05431); (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = RESNEXT_GROUPS, e: float = 0.5) -> None:
        super().__init__(c1, c2, shortcut, g, e)


@register("ResCSPA", channels=rules.out_width_repeated)
class ResCSPA(C3):
    """:class:`C3` with ResNet's bottlenecks, half as wide inside; (B, c1, H, W) to (B, c2, H, W)."""

    def stack(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return _stack(lambda: Res(c, c, shortcut, g, 0.5), n)


@register("ResXCSPA", channels=rules.out_width_repeated)
class ResXCSPA(C3):
    """:class:`C3` with ResNeXt's bottlenecks, as wide inside; (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = RESNEXT_GROUPS, e: float = 0.5) -> None:
        super().__init__(c1, c2, n, shortcut, g, e)

    def stack(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return _stack(lambda: Res(c, c, shortcut, g, 1.0), n)


@register("GhostCSPA", channels=rules.out_width_repeated)
class GhostCSPA(C3):
    """:class:`C3` with ghost bottlenecks; (B, c1, H, W) to (B, c2, H, W)."""

    def stack(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return _stack(lambda: GhostBottleneck(c, c), n)


@register("ResCSPB", channels=rules.out_width_repeated)
class ResCSPB(BottleneckCSPB):
    """:class:`BottleneckCSPB` with ResNet's bottlenecks, half as wide inside; (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1) -> None:
        super().__init__(c1, c2, 0)
        self.m = _stack(lambda: Res(c2, c2, shortcut, g, 0.5), n)


@register("ResXCSPB", channels=rules.out_width_repeated)
class ResXCSPB(BottleneckCSPB):
    """:class:`BottleneckCSPB` with ResNeXt's bottlenecks, as wide inside; (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = RESNEXT_GROUPS) -> None:
        super().__init__(c1, c2, 0)
        self.m = _stack(lambda: Res(c2, c2, shortcut, g, 1.0), n)


@register("GhostCSPB", channels=rules.out_width_repeated)
class GhostCSPB(BottleneckCSPB):
    """:class:`BottleneckCSPB` with ghost bottlenecks; (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1) -> None:
        super().__init__(c1, c2, 0)
        self.m = _stack(lambda: GhostBottleneck(c2, c2), n)


@register("ResCSPC", channels=rules.out_width_repeated)
class ResCSPC(BottleneckCSPC):
    """:class:`BottleneckCSPC` with ResNet's bottlenecks, half as wide inside; (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__(c1, c2, 0, e=e)
        c = int(c2 * e)
        self.m = _stack(lambda: Res(c, c, shortcut, g, 0.5), n)


@register("ResXCSPC", channels=rules.out_width_repeated)
class ResXCSPC(BottleneckCSPC):
    """:class:`BottleneckCSPC` with ResNeXt's bottlenecks, as wide inside; (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = RESNEXT_GROUPS, e: float = 0.5) -> None:
        super().__init__(c1, c2, 0, e=e)
        c = int(c2 * e)
        self.m = _stack(lambda: Res(c, c, shortcut, g, 1.0), n)


@register("GhostCSPC", channels=rules.out_width_repeated)
class GhostCSPC(BottleneckCSPC):
    """:class:`BottleneckCSPC` with ghost bottlenecks; (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1, e: float = 0.5) -> None:
        super().__init__(c1, c2, 0, e=e)
        c = int(c2 * e)
        self.m = _stack(lambda: GhostBottleneck(c, c), n)


def _stack(make: Callable[[], nn.Module], n: int) -> nn.Sequential:
    return nn.Sequential(*(make() for _ in range(n)))
