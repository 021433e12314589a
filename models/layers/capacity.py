"""A plain convolution block of a chosen size, which an attention module is compared with: capacity without attention."""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.conv import Conv
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("ConvControl", channels=rules.same_width, kind="block")
class ConvControl(nn.Module):
    """x + W₃(W₂(W₁ x)): ResNet's bottleneck of 1×1, k×k and 1×1 convolutions; (B, C, H, W) to (B, C, H, W).

    Every convolution has a batch norm and the first two an activation. The two inner widths are free, so that parameters, or
    multiply-adds, can be matched with those of another module (engine/study/control.py). Source: ResNet, arXiv 1512.03385.

    Args:
        channel: channels in and out.
        hidden: channels between the first and the second convolution; half of ``channel`` if not given.
        middle: channels between the second and the third; ``hidden`` if not given.
        kernel: k, odd.
    """

    def __init__(self, channel: int, hidden: int | None = None, middle: int | None = None, kernel: int = 3) -> None:
        super().__init__()
        hidden = hidden or max(channel // 2, 1)
        middle = middle or hidden
        self.cv1 = Conv(channel, hidden, 1)
        self.cv2 = Conv(hidden, middle, kernel)
        self.cv3 = Conv(middle, channel, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv3(self.cv2(self.cv1(x)))
