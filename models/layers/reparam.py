"""Convolutions that train as several branches and run as one.

Sources: RepVGG (arXiv 2101.03697); YOLOv7 (arXiv 2207.02696), whose planned form leaves the identity branch out where a residual or a
concatenation follows; YOLOv9 (arXiv 2402.13616), whose RepConvN never has one.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.conv import Activation, Conv, FusedConv, bias_of, fuse_conv_bn, make_activation
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("RepConvN", channels=rules.out_width)
class RepConvN(nn.Module):
    """A 3×3 and a 1×1 branch, each with its batch norm, added before the activation; (B, c1, H, W) to (B, c2, ceil(H/s), ceil(W/s)).

    Source: YOLOv9, arXiv 2402.13616; RepVGG without the identity branch.
    """

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, p: int = 1, g: int = 1, d: int = 1, act: Activation = True) -> None:
        super().__init__()
        _require_3x3(k, p, d)
        self.conv1 = Conv(c1, c2, k, s, p=p, g=g, act=False)
        self.conv2 = Conv(c1, c2, 1, s, p=0, g=g, act=False)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1(x) + self.conv2(x))

    def fused(self) -> FusedConv:
        """The same function in eval mode as one 3×3 convolution with a bias."""
        branches = [b.fused() if isinstance(b, Conv) else b for b in (self.conv1, self.conv2)]  # either may already be fused
        return FusedConv(merge_branches([b.conv for b in branches]), self.act).train(self.training)


@register("RepConv", channels=rules.out_width)
class RepConv(nn.Module):
    """RepVGG's block as YOLOv7 has it: 3×3, 1×1 and, where shape allows, a bare batch norm; (B, c1, H, W) to (B, c2, ceil(H/s), ceil(W/s)).

    Source: RepVGG, arXiv 2101.03697, fig. 2; YOLOv7, arXiv 2207.02696.
    """

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, p: int | None = None, g: int = 1, act: Activation = True) -> None:
        super().__init__()
        _require_3x3(k, 1 if p is None else p, 1)
        self.rbr_identity = nn.BatchNorm2d(c1) if c1 == c2 and s == 1 else None
        self.rbr_dense = _conv_bn(c1, c2, 3, s, g)
        self.rbr_1x1 = _conv_bn(c1, c2, 1, s, g)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return self.act(y if self.rbr_identity is None else y + self.rbr_identity(x))

    def fused(self) -> FusedRepConv:
        """The same function in eval mode as one 3×3 convolution with a bias."""
        branches = [fuse_conv_bn(*self.rbr_dense), fuse_conv_bn(*self.rbr_1x1)]
        if self.rbr_identity is not None:
            branches.append(fuse_conv_bn(_identity_conv(branches[0]), self.rbr_identity))
        return FusedRepConv(merge_branches(branches), self.act).train(self.training)


class FusedRepConv(nn.Module):
    """The inference form of :class:`RepConv`, under YOLOv7's parameter names."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.rbr_reparam = conv
        self.act = copy.deepcopy(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.rbr_reparam(x))


def merge_branches(branches: list[nn.Conv2d]) -> nn.Conv2d:
    """A new convolution equal to the sum of parallel ones with biases; 1×1 kernels are centred in the first's 3×3."""
    merged = copy.deepcopy(branches[0])
    with torch.no_grad():
        for branch in branches[1:]:
            margin = (merged.kernel_size[0] - branch.kernel_size[0]) // 2
            merged.weight += F.pad(branch.weight, [margin] * 4)
            bias_of(merged).add_(bias_of(branch))
    return merged


def _conv_bn(c1: int, c2: int, k: int, s: int, g: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(c2))


def _identity_conv(like: nn.Conv2d) -> nn.Conv2d:
    """A 1×1 convolution that passes its input through, with the groups of ``like``."""
    conv = nn.Conv2d(like.in_channels, like.out_channels, 1, groups=like.groups, bias=False).to(like.weight)
    nn.init.dirac_(conv.weight, groups=like.groups)
    return conv


def _require_3x3(k: int, p: int, d: int) -> None:
    if (k, p, d) != (3, 1, 1):
        raise ValueError(f"a re-parameterised convolution is 3x3 with padding 1 and dilation 1, not k={k}, p={p}, d={d}")
