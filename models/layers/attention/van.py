"""Large kernel attention: a wide kernel as a depth-wise, a dilated depth-wise and a pointwise convolution, used as a gate."""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.attention.ops.shared import GatedResidual, depthwise
from models.layers.explained import explain_gate
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Visual Attention Network, arXiv 2202.09741"


@register("LKA", channels=rules.same_width, kind="attention", paper=PAPER)
class LKA(nn.Module):
    """x · conv1x1(dilated 7x7(5x5(x))), both depth-wise, dilation 3: a 21x21 field (equations 1 and 2 of the paper).

    Args:
        dim: channels in and out.
        d_model: the same, under the name that the block around it has for it.

    Raises:
        ValueError: none of the two, or two that differ.
    """

    def __init__(self, dim: int | None = None, *, d_model: int | None = None) -> None:
        super().__init__()
        widths = {width for width in (dim, d_model) if width is not None}
        if len(widths) != 1:
            raise ValueError(f"LKA: one width is expected, not dim {dim} and d_model {d_model}")
        dim = widths.pop()
        self.conv0 = depthwise(dim, 5)
        self.conv_spatial = depthwise(dim, 7, dilation=3)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """Weights of any sign and size: (B, C, H, W) -> the same."""
        return self.conv1(self.conv_spatial(self.conv0(x)))  # type: ignore[no-any-return]


@register("LKAAttention", "LKA_Attention", channels=rules.same_width, kind="attention", paper=PAPER)
class LKAAttention(GatedResidual):
    """LKA between two pointwise convolutions, with a residual.

    Args:
        d_model: channels in and out.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, LKA(d_model))
