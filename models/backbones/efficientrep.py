"""EfficientRep, the backbone of YOLOv6: stacks of RepVGG blocks that run as plain 3x3 convolutions.

YOLOv6: A Single-Stage Object Detection Framework for Industrial Applications, arXiv 2209.02976; RepVGG, arXiv 2101.03697.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.whole import listed_by_stage
from models.layers.conv import Conv, FusedConv, fuse_conv_bn
from models.layers.reparam import merge_branches
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "YOLOv6: A Single-Stage Object Detection Framework for Industrial Applications, arXiv 2209.02976"


@register("RepVGGBlock", channels=rules.out_width, kind="backbone", paper="RepVGG: Making VGG-style ConvNets Great Again, arXiv 2101.03697")
class RepVGGBlock(nn.Module):
    """ReLU(BN(conv3x3(x)) + BN(conv1x1(x)) + BN(x)), the last only where widths and stride allow (figure 4 of the paper).

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: 3.
        stride: of the two convolutions.
        padding: 1.
        groups: of the two convolutions.

    Raises:
        ValueError: another kernel or padding.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padding: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        if (kernel_size, padding) != (3, 1):
            raise ValueError(f"RepVGGBlock is 3x3 with padding 1, not {kernel_size}x{kernel_size} with padding {padding}")
        self.rbr_identity = nn.BatchNorm2d(in_channels) if in_channels == out_channels and stride == 1 else None
        self.rbr_dense = Conv(in_channels, out_channels, 3, stride, g=groups, act=False)
        self.rbr_1x1 = Conv(in_channels, out_channels, 1, 1, g=groups, act=False)  # of every stride-th place, see forward
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        # not a strided convolution: oneDNN's gradient of one with 3 channels in, channels-last, damages the heap on some CPUs (torch 2.14)
        total = self.rbr_dense(x) + self.rbr_1x1(x[..., :: self.stride, :: self.stride])
        return F.relu(total if self.rbr_identity is None else total + self.rbr_identity(x))

    def fused(self) -> FusedConv:
        """The same function in eval mode as one 3x3 convolution with a bias."""
        branches = [b.conv if isinstance(b, FusedConv) else fuse_conv_bn(b.conv, b.bn) for b in (self.rbr_dense, self.rbr_1x1)]
        if self.rbr_identity is not None:
            dense = branches[0]
            passing = nn.Conv2d(dense.in_channels, dense.out_channels, 1, groups=dense.groups, bias=False).to(dense.weight)
            nn.init.dirac_(passing.weight, groups=dense.groups)
            branches.append(fuse_conv_bn(passing, self.rbr_identity))
        return FusedConv(merge_branches(branches), nn.ReLU()).train(self.training)


class ConvBNAct(nn.Module):
    """act(BN(conv3x3(x))) under YOLOv6's keys ``block.conv`` and ``block.bn``; (B, in_channels, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, act: nn.Module) -> None:
        super().__init__()
        self.block = Conv(in_channels, out_channels, 3, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


BASIC_BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {
    "RepVGGBlock": RepVGGBlock,
    "ConvBNReLU": lambda c1, c2: ConvBNAct(c1, c2, nn.ReLU()),
    "ConvBNSiLU": lambda c1, c2: ConvBNAct(c1, c2, nn.SiLU()),
}


@register("BottleRep", channels=rules.out_width, kind="backbone", paper=PAPER)
class BottleRep(nn.Module):
    """Two RepVGG blocks, or two plain convolutions, plus α x where the widths allow it (YOLOv6's larger networks).

    α is a learned number that starts at 1.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        basic_block: ``RepVGGBlock``, ``ConvBNReLU`` or ``ConvBNSiLU``.

    Raises:
        ValueError: another basic block.
    """

    def __init__(self, in_channels: int, out_channels: int, basic_block: str = "RepVGGBlock") -> None:
        super().__init__()
        if basic_block not in BASIC_BLOCKS:
            raise ValueError(f"BottleRep: basic_block {basic_block!r}; known are {list(BASIC_BLOCKS)}")
        make = BASIC_BLOCKS[basic_block]
        self.conv1 = make(in_channels, out_channels)
        self.conv2 = make(out_channels, out_channels)
        self.alpha = nn.Parameter(torch.ones(1)) if in_channels == out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        y = self.conv2(self.conv1(x))
        return y if self.alpha is None else y + self.alpha.to(x.dtype) * x


@register("YOLOv6RepBlock", channels=rules.out_width_repeated, kind="backbone", paper=PAPER)
class YOLOv6RepBlock(nn.Module):
    """``n`` RepVGG blocks in a row (figure 3a of the paper), or half as many of two blocks each.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        n: number of blocks.
        block: ``RepVGGBlock``, ``ConvBNReLU``, ``ConvBNSiLU``, or ``BottleRep`` for ``n // 2`` of these.
        basic_block: what a BottleRep is made of: ``RepVGGBlock``, ``ConvBNReLU`` or ``ConvBNSiLU``.

    Raises:
        ValueError: another block, or a basic block for a block that is not made of any.
    """

    def __init__(
        self, in_channels: int, out_channels: int, n: int = 1, block: str = "RepVGGBlock", basic_block: str = "RepVGGBlock"
    ) -> None:
        super().__init__()
        if block not in (*BASIC_BLOCKS, "BottleRep") or basic_block not in BASIC_BLOCKS:
            known = f"block {[*BASIC_BLOCKS, 'BottleRep']} and basic_block {list(BASIC_BLOCKS)}"
            raise ValueError(f"YOLOv6RepBlock: block {block!r}, basic_block {basic_block!r}; known are {known}")
        if block != "BottleRep" and basic_block not in ("RepVGGBlock", block):
            raise ValueError(f"YOLOv6RepBlock: basic_block {basic_block!r} is for block 'BottleRep', got block {block!r}")
        make = partial(BottleRep, basic_block=basic_block) if block == "BottleRep" else BASIC_BLOCKS[block]
        count = n // 2 if block == "BottleRep" else n
        self.conv1 = make(in_channels, out_channels)
        self.block = nn.Sequential(*(make(out_channels, out_channels) for _ in range(count - 1))) if count > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        x = self.conv1(x)
        return x if self.block is None else self.block(x)


@register("EfficientRepStage", channels=rules.out_width_repeated, kind="backbone", paper=PAPER)
class EfficientRepStage(nn.Sequential):
    """A RepVGG block with stride 2, then ``n`` at the new size: (B, c1, H, W) -> (B, c2, ceil(H / 2), ceil(W / 2)).

    Args:
        c1: channels in.
        c2: channels out.
        n: blocks after the strided one.
    """

    def __init__(self, c1: int, c2: int, n: int = 1) -> None:
        super().__init__(RepVGGBlock(c1, c2, stride=2), YOLOv6RepBlock(c2, c2, n))


@register("EfficientRep", channels=listed_by_stage("yolov8-EfficientRep.yaml"), kind="backbone", paper=PAPER)
class EfficientRep(nn.Module):
    """The whole backbone up to its last stage; gives the maps at strides 4 to 32.

    Args:
        in_channels: channels of the image.
        channels_list: width of the stem and of the four stages.
        num_repeats: RepVGG blocks in each stage after the strided one.
    """

    def __init__(
        self, in_channels: int = 3, channels_list: tuple[int, ...] = (16, 32, 64, 128, 256), num_repeats: tuple[int, ...] = (2, 4, 6, 2)
    ) -> None:
        super().__init__()
        self.stem = RepVGGBlock(in_channels, channels_list[0], stride=2)
        self.stages = nn.ModuleList(EfficientRepStage(a, b, n) for a, b, n in zip(channels_list, channels_list[1:], num_repeats))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) -> maps at strides 4, 8, 16 and 32."""
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
