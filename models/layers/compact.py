"""YOLOv10's blocks that cost little: compact inverted bottlenecks, a large depth-wise kernel, and down-sampling in two steps.

Source: YOLOv10: Real-Time End-to-End Object Detection, arXiv 2405.14458, section 3.2. Parameter names are the published ones.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.conv import Conv, FusedConv, make_activation
from models.layers.csp import SplitAggregation
from models.layers.reparam import merge_branches
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "YOLOv10: Real-Time End-to-End Object Detection, arXiv 2405.14458"


@register("SCDown", channels=rules.out_width, paper=PAPER)
class SCDown(nn.Module):
    """A 1×1 convolution for the channels, then a depth-wise one for the size, without activation; (B, c1, H, W) to (B, c2, ceil(H/s), …).

    Args:
        c1: input channels.
        c2: output channels.
        k: kernel size of the depth-wise convolution.
        s: its stride.
    """

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 2) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c2, 1)
        self.cv2 = Conv(c2, c2, k, s, g=c2, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(self.cv1(x))


@register("RepVGGDW", channels=rules.same_width, kind="block")
class RepVGGDW(nn.Module):
    """A 7×7 and a 3×3 depth-wise branch, each with its batch norm, added before the activation; (B, C, H, W) to the same.

    Source: section 3.2 of the paper (large-kernel convolution), after RepVGG, arXiv 2101.03697.
    """

    def __init__(self, ed: int) -> None:
        super().__init__()
        self.conv = Conv(ed, ed, 7, g=ed, act=False)
        self.conv1 = Conv(ed, ed, 3, g=ed, act=False)
        self.act = make_activation(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + self.conv1(x))

    def fused(self) -> FusedConv:
        """The same function in eval mode as one 7×7 depth-wise convolution with a bias."""
        branches = [b.fused() if isinstance(b, Conv) else b for b in (self.conv, self.conv1)]  # either may already be fused
        return FusedConv(merge_branches([b.conv for b in branches]), self.act).train(self.training)


@register("CIB", channels=rules.out_width, paper=PAPER)
class CIB(nn.Module):
    """Compact inverted block: depth-wise 3×3, 1×1 to twice the width, depth-wise, 1×1 back, depth-wise 3×3 (figure 3b of the paper).

    (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        shortcut: add the input where the widths are equal.
        e: half of the inner width, in multiples of ``c2``.
        lk: the depth-wise convolution in the middle is a :class:`RepVGGDW` (7×7).
    """

    def __init__(self, c1: int, c2: int, shortcut: bool = True, e: float = 0.5, lk: bool = False) -> None:
        super().__init__()
        wide = 2 * int(c2 * e)
        self.cv1 = nn.Sequential(
            Conv(c1, c1, 3, g=c1),
            Conv(c1, wide, 1),
            RepVGGDW(wide) if lk else Conv(wide, wide, 3, g=wide),
            Conv(wide, c2, 1),
            Conv(c2, c2, 3, g=c2),
        )
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return x + y if self.add else y


@register("C2fCIB", channels=rules.out_width_repeated, paper=PAPER)
class C2fCIB(SplitAggregation):
    """C2f of compact inverted blocks; (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        n: number of blocks.
        shortcut: whether each adds its input.
        lk: with large kernels.
        g: has no effect; the blocks' convolutions are depth-wise already. It keeps the place that C2f's groups have in rows.
        e: inner channels per output channel.
    """

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = False, lk: bool = False, g: int = 1, e: float = 0.5
    ) -> None:  # fmt: skip
        super().__init__(c1, c2, n, e, lambda c: CIB(c, c, shortcut, 1.0, lk))
