"""Blocks of RT-DETR's backbone (PP-HGNetV2) and neck: a stem of two paths, stages that join all their layers, a re-parameterised CSP block.

Names and shapes are those of the networks published as rtdetr-l and rtdetr-x (arXiv 2304.08069).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.conv import Conv, DWConv
from models.layers.reparam import RepConvN
from models.spec import channel_rules as rules
from models.spec.channel_rules import LayerPlan, RuleContext
from models.spec.registry import register
from utils.errors import UserError


def hidden_and_out(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """``[c_hidden, c_out, …]``: two widths that are not scaled, as published; repeats are inside the block, behind its kernel."""
    if len(args) < 2 or not all(isinstance(c, int) and not isinstance(c, bool) and c > 0 for c in args[:2]):
        raise UserError(f"expects its hidden and its output width as the first arguments, such as [96, 512], not {list(args[:2])}")
    hidden, out, *options = args
    if getattr(context.cls, "repeats_inside", False):
        kernel, *further = options or [3]
        options = [kernel, context.repeats, *further]
    return LayerPlan((context.single, hidden, out, *options), out)


@register("HGStem", channels=hidden_and_out)
class HGStem(nn.Module):
    """A strided convolution, then a max pool beside two 2×2 convolutions, joined and halved again; (B, c1, H, W) to (B, c2, H/4, W/4).

    Args:
        c1: input channels.
        cm: channels inside.
        c2: output channels.
    """

    def __init__(self, c1: int, cm: int, c2: int) -> None:
        super().__init__()
        act = nn.ReLU()
        self.stem1 = Conv(c1, cm, 3, 2, act=act)
        self.stem2a = Conv(cm, cm // 2, 2, 1, p=0, act=act)
        self.stem2b = Conv(cm // 2, cm, 2, 1, p=0, act=act)
        self.stem3 = Conv(2 * cm, cm, 3, 2, act=act)
        self.stem4 = Conv(cm, c2, 1, 1, act=act)
        self.pool = nn.MaxPool2d(2, stride=1, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.stem1(x), (0, 1, 0, 1))  # so that kernels of 2 keep the size
        convolved = self.stem2b(F.pad(self.stem2a(x), (0, 1, 0, 1)))
        return self.stem4(self.stem3(torch.cat((self.pool(x), convolved), dim=1)))


@register("LightConv", channels=rules.out_width)
class LightConv(nn.Module):
    """A pointwise convolution without activation, then a depthwise one; (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, k: int = 1, act: nn.Module | bool = True) -> None:
        super().__init__()
        self.conv1 = Conv(c1, c2, 1, act=False)
        self.conv2 = DWConv(c2, c2, k, act=nn.ReLU() if act is True else act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


@register("HGBlock", channels=hidden_and_out)
class HGBlock(nn.Module):
    """``n`` convolutions in a row, the input and all outputs joined and squeezed; (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        cm: channels of each convolution.
        c2: output channels.
        k: kernel of each.
        n: number of convolutions.
        lightconv: whether they are :class:`LightConv`.
        shortcut: adds the input where c1 = c2.
    """

    repeats_inside = True

    def __init__(self, c1: int, cm: int, c2: int, k: int = 3, n: int = 6, lightconv: bool = False, shortcut: bool = False) -> None:
        super().__init__()
        act, block = nn.ReLU(), LightConv if lightconv else Conv
        self.m = nn.ModuleList(block(c1 if i == 0 else cm, cm, k=k, act=act) for i in range(n))
        self.sc = Conv(c1 + n * cm, c2 // 2, 1, act=act)
        self.ec = Conv(c2 // 2, c2, 1, act=act)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.m:
            maps.append(layer(maps[-1]))
        y = self.ec(self.sc(torch.cat(maps, dim=1)))
        return y + x if self.add else y


@register("RepC3", channels=rules.out_width_repeated)
class RepC3(nn.Module):
    """A pointwise convolution and ``n`` re-parameterised ones behind it, plus another pointwise one; (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        n: number of re-parameterised convolutions.
        e: inner width as a fraction of c2; where it is not 1, a pointwise convolution restores c2.
    """

    def __init__(self, c1: int, c2: int, n: int = 3, e: float = 1.0) -> None:
        super().__init__()
        inner = int(c2 * e)
        self.cv1 = Conv(c1, inner, 1)
        self.cv2 = Conv(c1, inner, 1)
        self.m = nn.Sequential(*(RepConvN(inner, inner) for _ in range(n)))
        self.cv3 = Conv(inner, c2, 1) if inner != c2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(self.m(self.cv1(x)) + self.cv2(x))
