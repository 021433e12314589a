"""HyperACE: three levels are joined, correlated over the whole map by hypergraphs, and handed back to every level (FullPAD).

YOLOv13: Real-Time Object Detection with Hypergraph-Enhanced Adaptive Visual Perception, arXiv 2506.17733.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.yolov13 import C3AH, PAPER, DSBottleneck, DSC3k
from models.layers.conv import Conv
from models.spec import channel_rules as rules
from models.spec.channel_rules import LayerPlan, RuleContext
from models.spec.registry import register
from utils.errors import UserError

LEVELS = 3
LARGE_KERNEL = 7  # of the blocks for local correlations
HYPEREDGES_AT_SCALE = {"n": 0.5, "x": 1.5}  # of the number in a row, in a file with scales
WIDEST = 1 << 30  # a width that every file with a cap cuts


class FuseModule(nn.Module):
    """A finer map by average pooling and a coarser one by repetition, both at the middle one's size, joined by a 1×1 convolution.

    Args:
        widths: channels of the three maps, from fine to coarse.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.conv_out = Conv(sum(widths), widths[1])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, c, H, W) of each level -> (B, c of the middle one, H and W of the middle one)."""
        fine, middle, coarse = maps
        if not fine.shape[-1] >= middle.shape[-1] >= coarse.shape[-1]:
            sizes = ", ".join(f"{height}x{width}" for height, width in (level.shape[-2:] for level in maps))
            raise ValueError(f"HyperACE reads its levels from fine to coarse, got {sizes}")
        return self.conv_out(torch.cat((halve(fine), middle, F.interpolate(coarse, size=middle.shape[-2:], mode="nearest")), 1))


def halve(x: Tensor) -> Tensor:
    """Means of 2×2 pixels: (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)), means of fewer at the border of an odd size."""
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


def _joined(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """``[c_out, …]`` behind three maps, with the repeats inside the block."""
    if len(context.plain) != LEVELS:
        raise UserError(f"reads {LEVELS} levels, from fine to coarse, not {len(context.plain)}")
    out = rules.width_argument(args, context)
    return LayerPlan((context.plain, out, context.repeats, *args[1:]), out, takes_list=True)


@register("HyperACE", channels=_joined, kind="neck", paper=PAPER)
class HyperACE(nn.Module):
    """Correlations of high order by two hypergraph branches, of low order by depth-wise blocks, and a shortcut, joined (section 3.3).

    Maps of three levels, each half (rounded up) of the one before, to one of the middle level's size.

    Args:
        c1: channels of the three maps, from fine to coarse.
        c2: output channels.
        n: number of blocks for correlations of low order.
        num_hyperedges: hyperedges of each branch; at scale n of a file with scales half of them, at x half more.
        dsc3k: the blocks of low order are :class:`DSC3k`, not single bottlenecks.
        shortcut: whether their bottlenecks add their input.
        e1: inner channels per output channel.
        e2: inner channels of a hypergraph branch, per channel of it.
        context: as ``AdaHGComputation`` has it.
    """

    def __init__(
        self,
        c1: Sequence[int],
        c2: int,
        n: int = 1,
        num_hyperedges: int = 8,
        dsc3k: bool = True,
        shortcut: bool = False,
        e1: float = 0.5,
        e2: float = 1.0,
        context: str = "both",
    ) -> None:
        super().__init__()
        hidden = int(c2 * e1)
        self.cv1 = Conv(c1[1], 3 * hidden)
        self.cv2 = Conv((4 + n) * hidden, c2)
        self.m = nn.ModuleList(
            DSC3k(hidden, hidden, 2, shortcut, k1=3, k2=LARGE_KERNEL) if dsc3k else DSBottleneck(hidden, hidden, shortcut) for _ in range(n)
        )
        self.fuse = FuseModule(c1)
        self.branch1 = C3AH(hidden, hidden, e2, num_hyperedges, context)
        self.branch2 = C3AH(hidden, hidden, e2, num_hyperedges, context)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, c, H, W) of each level -> (B, c2, H and W of the middle one)."""
        kept, high, low = self.cv1(self.fuse(maps)).chunk(3, 1)
        parts = [kept, self.branch1(high), low]
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat((*parts, self.branch2(high)), 1))

    @classmethod
    def row_options(cls, placed: Mapping[str, Any], scale: str) -> dict[str, Any]:
        """Fewer or more hyperedges at the smallest and the largest scale: published files rely on it."""
        if scale not in HYPEREDGES_AT_SCALE:
            return {}
        return {"num_hyperedges": max(1, int(placed.get("num_hyperedges", 8) * HYPEREDGES_AT_SCALE[scale]))}


def _to_coarser(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """``[]`` or ``[channel_adjust]``: twice the width, but not more than the file's widest, which the coarser level has then."""
    adjust = args[0] if args else context.single < context.width(WIDEST)
    out = min(2 * context.single, context.width(WIDEST)) if adjust else context.single
    return LayerPlan((context.single, out, *args[1:]), out)


@register("DownsampleConv", channels=_to_coarser, kind="neck", paper=PAPER)
class DownsampleConv(nn.Module):
    """Average pooling of 2×2 pixels and, where the widths differ, a 1×1 convolution; (B, c1, H, W) to (B, c2, ceil(H/2), ceil(W/2)).

    Args:
        c1: input channels.
        c2: output channels.
    """

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.channel_adjust = Conv(c1, c2) if c1 != c2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_adjust(halve(x))


@register("FullPAD_Tunnel", "FullPADTunnel", channels=rules.add, kind="neck", paper=PAPER)
class FullPADTunnel(nn.Module):
    """x + γ y: a map of the network and what HyperACE gives for its level, γ learned and 0 at first (section 3.4)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.0))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Two maps (B, C, H, W) -> (B, C, H, W)."""
        own, enhanced = maps
        return own + self.gate * enhanced
