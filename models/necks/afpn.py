"""Asymptotic feature pyramid: adjacent levels are fused first, with softmax weights over the levels at each position.

AFPN: Asymptotic Feature Pyramid Network for Object Detection, arXiv 2306.15988; the weights are ASFF's, arXiv 1911.09516.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.whole import listed_by_stage
from models.layers.attention.ops.common import weighted_sum
from models.necks.blending import blends
from models.spec import channel_rules as rules
from models.spec.registry import register

COMPRESSED = 8  # channels from which a level's weight is decided
PAPER = "AFPN: Asymptotic Feature Pyramid Network for Object Detection, arXiv 2306.15988"
ASFF_PAPER = "Learning Spatial Fusion for Single-Shot Object Detection, arXiv 1911.09516"


@register("ASFF", channels=blends, kind="neck", paper=ASFF_PAPER)
class ASFF(nn.Module):
    """conv3x3(Σ wₗ xₗ), w the softmax over the levels of a pointwise layer on compressed features (equations 1 to 3 of ASFF).

    The levels have one width and size already; AFPN's forms differ in the activation only (SiLU at three levels, ReLU at four).

    Args:
        inter_dim: channels of each level and out.
        inputs: number of levels.
        act: the activation's class.
        first: number of the first level in the parameter names.
    """

    def __init__(self, inter_dim: int, inputs: int = 2, *, act: Callable[[], nn.Module] = nn.SiLU, first: int = 1) -> None:
        super().__init__()
        self.names = [f"weight_level_{first + i}" for i in range(inputs)]
        for name in self.names:
            self.add_module(name, _conv(inter_dim, COMPRESSED, 1, act=act))
        self.weight_levels = nn.Conv2d(COMPRESSED * inputs, inputs, 1)
        self.conv = _conv(inter_dim, inter_dim, 3, act=act)

    def forward(self, maps: Sequence[Tensor], *others: Tensor) -> Tensor:
        """Each (B, C, H, W), as a list or one by one -> (B, C, H, W)."""
        maps = [maps, *others] if isinstance(maps, Tensor) else list(maps)
        compressed = torch.cat([getattr(self, name)(x) for name, x in zip(self.names, maps)], 1)
        weights = self.weight_levels(compressed).softmax(1).to(maps[0].dtype)
        return self.conv(weighted_sum(maps, weights.split(1, 1)))


@register("ASFF2", channels=blends, kind="neck", paper=ASFF_PAPER)
class ASFF2(ASFF):
    """ASFF between two levels."""

    def __init__(self, inter_dim: int, inputs: int = 2, *, act: Callable[[], nn.Module] = nn.SiLU) -> None:
        super().__init__(inter_dim, _exactly(2, inputs), act=act)


@register("ASFF3", channels=blends, kind="neck", paper=ASFF_PAPER)
class ASFF3(ASFF):
    """ASFF between three levels."""

    def __init__(self, inter_dim: int, inputs: int = 3, *, act: Callable[[], nn.Module] = nn.SiLU) -> None:
        super().__init__(inter_dim, _exactly(3, inputs), act=act)


@register("ASFF4", channels=blends, kind="neck", paper=ASFF_PAPER)
class ASFF4(ASFF):
    """ASFF between four levels; its parameters count the levels from 0, and its activation is ReLU, as published."""

    def __init__(self, inter_dim: int, inputs: int = 4, *, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__(inter_dim, _exactly(4, inputs), act=act, first=0)


@register("AFPNBasicBlock", channels=rules.same_width, kind="neck", paper=PAPER)
class AFPNBasicBlock(nn.Module):
    """act(x + BN(conv3x3(act(BN(conv3x3(x)))))): ResNet's basic block with biases.

    Args:
        channels: channels in and out.
        act: the activation's class.
    """

    def __init__(self, channels: int, *, act: Callable[[], nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.act(x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))


@register("AFPNDown", channels=rules.out_width, kind="neck", paper=PAPER)
class AFPNDown(nn.Module):
    """A convolution whose kernel and stride are the factor: (B, c1, H, W) -> (B, c2, H / factor, W / factor).

    Args:
        c1: channels in.
        c2: channels out.
        factor: 2, 4 or 8.
        act: the activation's class.
        padding: zeros around the map: none in the published form for three levels, ``(factor - 1) // 2`` in that for four.
    """

    def __init__(self, c1: int, c2: int, factor: int = 2, *, act: Callable[[], nn.Module] = nn.SiLU, padding: int = 0) -> None:
        super().__init__()
        self.downsample = nn.Sequential(_conv(c1, c2, factor, stride=factor, padding=padding, act=act))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x)


@register("AFPNUp", channels=rules.out_width, kind="neck", paper=PAPER)
class AFPNUp(nn.Module):
    """A pointwise layer and bilinear interpolation: (B, c1, H, W) -> (B, c2, factor H, factor W).

    Limits: bilinear interpolation has no deterministic gradient on CUDA in older versions of PyTorch.

    Args:
        c1: channels in.
        c2: channels out.
        factor: 2, 4 or 8.
        act: the activation's class.
    """

    def __init__(self, c1: int, c2: int, factor: int = 2, *, act: Callable[[], nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.factor = factor
        self.upsample = nn.Sequential(_conv(c1, c2, 1, act=act))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.upsample(x), scale_factor=self.factor, mode="bilinear", align_corners=False)


class AFPNBody(nn.Module):
    """The steps of AFPN (figure 2 of the paper): step s blends the first s + 1 levels, all with all, then refines each.

    Args:
        channels: width of each level, finest first.
        names: of the levels, for the parameters' names.
        blocks: basic blocks between two steps.
        act: the activation's class.
        padded: the strided convolutions are padded by ``(kernel - 1) // 2``.
    """

    def __init__(
        self, channels: Sequence[int], *, names: Sequence[str], blocks: int, act: Callable[[], nn.Module], padded: bool = False
    ) -> None:
        super().__init__()
        self.names, self.steps, self.padded = tuple(names), len(names) - 1, padded
        if len(channels) != len(names):
            raise ValueError(f"AFPN: {len(channels)} widths for {len(names)} levels")
        for name, width in zip(names, channels):
            self.add_module(f"blocks_{name}1", nn.Sequential(_conv(width, width, 1, act=act)))
        for step in range(1, self.steps + 1):
            self._add_step(step, channels, blocks, act)

    def _add_step(self, step: int, channels: Sequence[int], blocks: int, act: Callable[[], nn.Module]) -> None:
        levels = range(step + 1)
        first = 0 if len(levels) == 4 else 1  # in the published names, four levels count from 0
        for target in levels:
            for source in levels:
                if source != target:
                    layer = self._resize(channels[source], channels[target], 2.0 ** (target - source), act)
                    self.add_module(self._resize_name(source, target, step), layer)
            name = self.names[target]
            self.add_module(f"asff_{name}{step}", ASFF(channels[target], len(levels), act=act, first=first))
            chain = (AFPNBasicBlock(channels[target], act=act) for _ in range(blocks))
            self.add_module(f"blocks_{name}{step + 1}", nn.Sequential(*chain))

    def _resize(self, c1: int, c2: int, ratio: float, act: Callable[[], nn.Module]) -> nn.Module:
        """From the size of one level to that of another, which is ``ratio`` times smaller (below 1: larger)."""
        if ratio < 1:
            return AFPNUp(c1, c2, int(1 / ratio), act=act)
        return AFPNDown(c1, c2, int(ratio), act=act, padding=(int(ratio) - 1) // 2 if self.padded else 0)

    def _resize_name(self, source: int, target: int, step: int) -> str:
        """A name consists of source, step and factor; at most one target matches."""
        way = "downsample" if source < target else "upsample"
        return f"{way}_{self.names[source]}{step}_{2 ** abs(source - target)}"

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels (B, Cₗ, H / 2ˡ, W / 2ˡ), finest first -> the same shapes."""
        refine = [getattr(self, f"blocks_{name}1") for name in self.names]
        maps = [layer(x) for layer, x in zip(refine, maps)]
        for step in range(1, self.steps + 1):
            levels = range(step + 1)
            blended = [self._blend(maps, target, levels, step) for target in levels]
            maps[: step + 1] = [getattr(self, f"blocks_{self.names[i]}{step + 1}")(blended[i]) for i in levels]
        return maps

    def _blend(self, maps: Sequence[Tensor], target: int, levels: range, step: int) -> Tensor:
        resized = [maps[s] if s == target else getattr(self, self._resize_name(s, target, step))(maps[s]) for s in levels]
        return getattr(self, f"asff_{self.names[target]}{step}")(resized)


@register("AFPNBody3", channels=listed_by_stage("yolov8-AFPN.yaml"), kind="neck", paper=PAPER)
class AFPNBody3(AFPNBody):
    """The body for three levels, as the authors use it on YOLOv5: SiLU, three basic blocks between steps.

    Args:
        channels: width of each level, finest first.
    """

    def __init__(self, channels: Sequence[int] = (128, 256, 512)) -> None:
        super().__init__(channels, names=("top", "mid", "bot"), blocks=3, act=nn.SiLU)


@register("AFPNBody4", channels=listed_by_stage("yolov8-AFPN.yaml"), kind="neck", paper=PAPER)
class AFPNBody4(AFPNBody):
    """The body for four levels, as the authors use it on Faster R-CNN: ReLU, four basic blocks between steps, padded down-sampling.

    Args:
        channels: width of each level, finest first.
    """

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512)) -> None:
        super().__init__(channels, names=("scalezero", "scaleone", "scaletwo", "scalethree"), blocks=4, act=nn.ReLU, padded=True)


@register("AFPN", channels=listed_by_stage("yolov8-AFPN.yaml"), kind="neck", paper=PAPER)
class AFPN(nn.Module):
    """The whole neck for three levels: widths to a quarter, the body, widths back.

    Args:
        in_channels: width of each level, finest first.
        out_channels: width of each output; None for the inputs' widths.
    """

    def __init__(self, in_channels: Sequence[int] = (256, 512, 1024), out_channels: Sequence[int] | None = None) -> None:
        super().__init__()
        narrow = [c // 4 for c in in_channels]
        outs = in_channels if out_channels is None else out_channels
        self.reduce = nn.ModuleList(_conv(a, b, 1) for a, b in zip(in_channels, narrow))
        self.body = AFPNBody3(narrow)
        self.expand = nn.ModuleList(_conv(a, b, 1) for a, b in zip(narrow, outs))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels (B, Cₗ, H / 2ˡ, W / 2ˡ), finest first -> (B, outₗ, H / 2ˡ, W / 2ˡ)."""
        narrow = self.body([layer(x) for layer, x in zip(self.reduce, maps)])
        return [layer(x) for layer, x in zip(self.expand, narrow)]


def _conv(
    c1: int, c2: int, k: int, *, stride: int = 1, padding: int | None = None, act: Callable[[], nn.Module] = nn.SiLU
) -> nn.Sequential:
    layers = nn.Sequential()
    layers.add_module("conv", nn.Conv2d(c1, c2, k, stride, k // 2 if padding is None else padding, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(c2))
    layers.add_module("act", act())
    return layers


def _exactly(wanted: int, inputs: int) -> int:
    if inputs != wanted:
        raise ValueError(f"ASFF{wanted} blends {wanted} levels, not {inputs}")
    return wanted
