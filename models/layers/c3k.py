"""YOLO11's aggregation block C3k2, whose inner blocks are bottlenecks, small CSP blocks, or (YOLO26) bottlenecks followed by attention.

No paper describes them: names and numbers are those of the published networks, the idea is that of C2f and C3 (models/layers/csp.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from models.layers.attention.yolov10 import PSABlock, heads_of
from models.layers.csp import C3, Bottleneck, SplitAggregation
from models.spec import channel_rules as rules
from models.spec.registry import register

LARGER_SCALES = ("m", "l", "x")  # of a file with scales, in which every C3k2 is one of C3k
INNER_BOTTLENECKS = 2  # of each C3k in a C3k2


@register("C3k", channels=rules.out_width_repeated)
class C3k(C3):
    """C3 whose bottlenecks have two k×k kernels (YOLO11); (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        n: number of bottlenecks.
        shortcut: whether each bottleneck adds its input.
        g: groups of its second convolution.
        e: inner channels per output channel.
        k: kernel size, odd.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5, k: int = 3) -> None:
        super().__init__(c1, c2, 0, e=e)
        c = int(c2 * e)
        self.m = nn.Sequential(*(Bottleneck(c, c, shortcut, g, (k, k), 1.0) for _ in range(n)))


@register("C3k2", channels=rules.out_width_repeated)
class C3k2(SplitAggregation):
    """C2f with other inner blocks (YOLO11, YOLO12, YOLO26); (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        n: number of inner blocks.
        c3k: they are :class:`C3k` of two bottlenecks, not single bottlenecks; always so at scales m, l and x of a file with scales.
        e: inner channels per output channel.
        attn: they are a bottleneck and a :class:`PSABlock` behind it, whatever ``c3k`` says (YOLO26).
        g: groups of the bottlenecks.
        shortcut: whether each bottleneck adds its input.
    """

    def __init__(
        self, c1: int, c2: int, n: int = 1, c3k: bool = False, e: float = 0.5, attn: bool = False, g: int = 1, shortcut: bool = True
    ) -> None:
        def block(c: int) -> nn.Module:
            if attn:
                return nn.Sequential(Bottleneck(c, c, shortcut, g), PSABlock(c, 0.5, heads_of(c)))
            return C3k(c, c, INNER_BOTTLENECKS, shortcut, g) if c3k else Bottleneck(c, c, shortcut, g)

        super().__init__(c1, c2, n, e, block)

    @classmethod
    def row_options(cls, placed: Mapping[str, Any], scale: str) -> dict[str, Any]:
        """``c3k`` at the larger scales, whatever the row has in its place: published files rely on it."""
        return {"c3k": True} if scale in LARGER_SCALES else {}
