"""The framework's own layers under the names that YAML rows give them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.spec import channel_rules as rules
from models.spec.registry import register

for _name in ("Upsample", "MaxPool2d", "AvgPool2d", "ReflectionPad2d", "Dropout2d", "SiLU", "ReLU", "LeakyReLU"):
    register(f"nn.{_name}", channels=rules.keep_width, kind="framework")(getattr(nn, _name))
for _name in ("Conv2d", "ConvTranspose2d"):
    register(f"nn.{_name}", channels=rules.out_width, kind="framework")(getattr(nn, _name))
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
