"""VanillaNet: one pointwise layer a stage, made non-linear by a series of shifted activations.

VanillaNet: the Power of Minimalism in Deep Learning, arXiv 2305.12972.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.whole import listed_by_stage
from models.layers.attention.ops.shared import window_maxima
from models.layers.conv import bias_of, fuse_conv_bn
from models.spec import channel_rules as rules
from models.spec.registry import register

EPS = 1e-6  # of every batch norm here, as published
PAPER = "VanillaNet: the Power of Minimalism in Deep Learning, arXiv 2305.12972"


class SeriesActivation(nn.Module):
    """BN(Σ over a neighbourhood of weight · ReLU(x)), per channel: a depth-wise convolution behind a ReLU (equation 6 of the paper).

    Args:
        channels: channels in and out.
        act_num: the neighbourhood is 2 act_num + 1 px wide.
    """

    def __init__(self, channels: int, act_num: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 2 * act_num + 1, 2 * act_num + 1))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.bn = nn.BatchNorm2d(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.bn(F.conv2d(F.relu(x), self.weight, None, padding=self.weight.shape[-1] // 2, groups=self.weight.shape[0]))


class _Pool(nn.Module):
    """The maximum of each window: (B, C, H, W) -> (B, C, ceil(H / size), ceil(W / size))."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return window_maxima(x, self.size)


@register("VanillaBlock", channels=rules.out_width, kind="backbone", paper=PAPER)
class VanillaBlock(nn.Module):
    """Two pointwise layers with a leaky ReLU between them, a max pool, and the series activation (section 3 of the paper).

    Args:
        dim: channels in.
        dim_out: channels out.
        act_num: see SeriesActivation.
        stride: of the max pool; 1 for none.
        act_learn: slope of the leaky ReLU: at 1 it is the identity and the two layers are one for inference. The paper's training
            raises it from 0 to 1.
    """

    def __init__(self, dim: int, dim_out: int, act_num: int = 3, stride: int = 2, act_learn: float = 1.0) -> None:
        super().__init__()
        self.act_learn, self.stride = act_learn, stride
        self.conv1 = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim, eps=EPS))
        self.conv2 = nn.Sequential(nn.Conv2d(dim, dim_out, 1), nn.BatchNorm2d(dim_out, eps=EPS))
        self.act = SeriesActivation(dim_out, act_num)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, dim_out, ceil(H / stride), ceil(W / stride))."""
        x = self.conv2(F.leaky_relu(self.conv1(x), self.act_learn))
        return self.act(window_maxima(x, self.stride))

    def fused(self) -> nn.Module:
        """The same function in eval mode with one pointwise layer, where ``act_learn`` is 1; else itself."""
        if self.act_learn != 1:
            return self
        first, second = (fuse_conv_bn(*layer) for layer in (self.conv1, self.conv2))
        merged = nn.Conv2d(first.in_channels, second.out_channels, 1).to(first.weight)
        with torch.no_grad():
            outer, inner = second.weight.double()[:, :, 0, 0], first.weight.double()[:, :, 0, 0]
            merged.weight.copy_((outer @ inner)[:, :, None, None])
            bias_of(merged).copy_(outer @ bias_of(first).double() + bias_of(second).double())
        return nn.Sequential(merged, _Pool(self.stride), self.act).train(self.training)


@register("VanillaStem", channels=rules.out_width, kind="backbone", paper=PAPER)
class VanillaStem(nn.Module):
    """A convolution with kernel and stride 4, a pointwise layer, the series activation: (B, c1, H, W) -> (B, c2, H / 4, W / 4).

    Args:
        c1: channels of the image.
        c2: channels out.
        act_num: see SeriesActivation.
    """

    def __init__(self, c1: int, c2: int, act_num: int = 3) -> None:
        super().__init__()
        self.stem1 = nn.Sequential(nn.Conv2d(c1, c2, 4, 4), nn.BatchNorm2d(c2, eps=EPS))
        self.stem2 = nn.Sequential(nn.Conv2d(c2, c2, 1), nn.BatchNorm2d(c2, eps=EPS), SeriesActivation(c2, act_num))

    def forward(self, x: Tensor) -> Tensor:
        return self.stem2(self.stem1(x))


@register("VanillaNet", channels=listed_by_stage("yolov8-VanillaNet.yaml"), kind="backbone", paper=PAPER)
class VanillaNet(nn.Module):
    """Stem and stages; gives the map of each stage. The defaults are VanillaNet-5 (512 channels after the stem).

    Args:
        in_chans: channels of the image.
        dims: width of the stem and of each stage.
        strides: of each stage.
        act_num: see SeriesActivation.
    """

    def __init__(
        self, in_chans: int = 3, dims: tuple[int, ...] = (512, 512, 1024, 2048), *, strides: tuple[int, ...] = (2, 2, 2), act_num: int = 3
    ) -> None:
        super().__init__()
        self.stem = VanillaStem(in_chans, dims[0], act_num)
        self.stages = nn.ModuleList(VanillaBlock(a, b, act_num, s) for a, b, s in zip(dims, dims[1:], strides))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> a map for each stage."""
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
