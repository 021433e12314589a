"""ShuffleNetV2: half of the channels pass, half go through a depth-wise bottleneck, and a shuffle mixes them.

ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, arXiv 1807.11164.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.backbones.whole import listed_by_stage
from models.layers.attention.ops.shared import channel_shuffle
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, arXiv 1807.11164"


@register("ShuffleNetV2Unit", channels=rules.out_width, kind="backbone", paper=PAPER)
class ShuffleNetV2Unit(nn.Module):
    """The basic unit (stride 1) and the one for spatial down-sampling (stride 2), figure 3c and 3d of the paper.

    Args:
        inp: channels in.
        oup: channels out, even; equal to ``inp`` at stride 1.
        stride: 1 or 2.

    Raises:
        ValueError: the widths or the stride do not fit.
    """

    def __init__(self, inp: int, oup: int, stride: int = 1) -> None:
        super().__init__()
        if stride not in (1, 2) or oup % 2 or (stride == 1 and inp != oup):
            raise ValueError(f"ShuffleNetV2Unit: {inp} to {oup} channels at stride {stride}; 1 keeps an even width, 2 is the other stride")
        half = oup // 2
        self.branch1 = nn.Sequential(*_depthwise(inp, 2), *_pointwise(inp, half)) if stride == 2 else None
        self.branch2 = nn.Sequential(*_pointwise(inp if stride == 2 else half, half), *_depthwise(half, stride), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inp, H, W) -> (B, oup, ceil(H / stride), ceil(W / stride))."""
        if self.branch1 is None:
            kept, changed = x.chunk(2, 1)
            branches = (kept, self.branch2(changed))
        else:
            branches = (self.branch1(x), self.branch2(x))
        return channel_shuffle(torch.cat(branches, 1), 2)


@register("ShuffleNetV2Stem", channels=rules.out_width, kind="backbone", paper=PAPER)
class ShuffleNetV2Stem(nn.Sequential):
    """Convolution of stride 2, batch norm, ReLU, max pool of stride 2: (B, c1, H, W) -> (B, c2, H / 4, W / 4)."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__(nn.Conv2d(c1, c2, 3, 2, 1, bias=False), nn.BatchNorm2d(c2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


@register("ShuffleNetV2Stage", channels=rules.out_width_repeated, kind="backbone", paper=PAPER)
class ShuffleNetV2Stage(nn.Sequential):
    """A unit of stride 2 and ``n - 1`` of stride 1: (B, c1, H, W) -> (B, c2, ceil(H / 2), ceil(W / 2)).

    Args:
        c1: channels in.
        c2: channels out, even.
        n: number of units.
    """

    def __init__(self, c1: int, c2: int, n: int = 4) -> None:
        super().__init__(ShuffleNetV2Unit(c1, c2, 2), *(ShuffleNetV2Unit(c2, c2) for _ in range(n - 1)))


@register("ShuffleNetV2", channels=listed_by_stage("yolov8-ShuffleNetV2.yaml"), kind="backbone", paper=PAPER)
class ShuffleNetV2(nn.Module):
    """Stem and three stages; gives the maps of the stages. The defaults are the size x1.0.

    Args:
        in_channels: channels of the image.
        widths: of the stem and of each stage.
        repeats: units of each stage.
    """

    def __init__(self, in_channels: int = 3, widths: tuple[int, ...] = (24, 116, 232, 464), repeats: tuple[int, ...] = (4, 8, 4)) -> None:
        super().__init__()
        self.stem = ShuffleNetV2Stem(in_channels, widths[0])
        self.stages = nn.ModuleList(ShuffleNetV2Stage(a, b, n) for a, b, n in zip(widths, widths[1:], repeats))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) -> maps at strides 8, 16 and 32."""
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def _pointwise(c1: int, c2: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(c1, c2, 1, bias=False), nn.BatchNorm2d(c2), nn.ReLU()


def _depthwise(channels: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)
