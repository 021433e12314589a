"""The framework's own layers under the names that YAML rows give them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.spec import channel_rules as rules
from models.spec.registry import register


def convolution(args: Sequence[Any], context: rules.RuleContext) -> rules.LayerPlan:
    """``[c_out, kernel, …]``: as out_width; ``[c, c, kernel, …]`` is the width in and out, where it is the input's.

    Groups that equal the written width mean one a channel, and are scaled like it: ``[512, 4, 2, 1, 0, 512]``.
    """
    integers = [type(a) is int for a in args]
    twice = len(args) > 2 and all(integers[:2]) and args[0] == args[1] > rules.LARGEST_OPTION
    if twice and context.single in (args[0], context.width(args[0])):
        return rules.LayerPlan((context.single, context.single, *args[2:]), context.single, context.repeats)
    if len(args) > GROUPS and integers[GROUPS] and args[GROUPS] == args[0]:
        args = [*args[:GROUPS], context.width(args[GROUPS]), *args[GROUPS + 1 :]]
    return rules.out_width(args, context)


GROUPS = 5  # their place in a row of either convolution
for _name in ("Upsample", "MaxPool2d", "AvgPool2d", "ReflectionPad2d", "Dropout2d", "SiLU", "ReLU", "LeakyReLU"):
    register(f"nn.{_name}", channels=rules.keep_width, kind="framework")(getattr(nn, _name))
for _name in ("Conv2d", "ConvTranspose2d"):
    register(f"nn.{_name}", channels=convolution, kind="framework")(getattr(nn, _name))
register("nn.BatchNorm2d", channels=rules.same_width, kind="framework")(nn.BatchNorm2d)
register("nn.PixelShuffle", channels=rules.rearrange(lambda c, factor: c // factor**2), kind="framework")(nn.PixelShuffle)
register("nn.PixelUnshuffle", channels=rules.rearrange(lambda c, factor: c * factor**2), kind="framework")(nn.PixelUnshuffle)


@register("nn.ZeroPad2d", channels=rules.keep_width, kind="framework")
class ZeroPad2d(nn.ZeroPad2d):
    """Zeros around a map: (B, C, H, W) to (B, C, H + top + bottom, W + left + right).

    For ONNX the zeros are concatenated: onnxruntime (and onnx-simplifier) fold a padding operator into a max-pooling that follows it (as in
    yolov3-tiny), which pads with minus infinity; the result differs where all values are negative.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return super().forward(x)
        left, right, top, bottom = self.padding
        x = torch.cat([*[torch.zeros_like(x[..., :1])] * left, x, *[torch.zeros_like(x[..., :1])] * right], dim=3)
        return torch.cat([*[torch.zeros_like(x[:, :, :1])] * top, x, *[torch.zeros_like(x[:, :, :1])] * bottom], dim=2)


@register("DWConvTranspose2d", channels=rules.out_width)
class DWConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution with as many groups as both widths allow (YOLOv5); (B, c1, H, W) to (B, c2, (H − 1)s − 2p1 + k + p2, …)."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p1: int = 0, p2: int = 0) -> None:
        super().__init__(c1, c2, k, s, p1, p2, groups=math.gcd(c1, c2))
