"""Large separable kernel attention: LKA whose two depth-wise kernels are rows and columns."""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.attention.ops.shared import GatedResidual, depthwise
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Large Separable Kernel Attention, arXiv 2309.01439"
KERNELS = {7: (3, 3, 2), 11: (3, 5, 2), 23: (5, 7, 3), 35: (5, 11, 3), 41: (5, 13, 3), 53: (5, 17, 3)}  # field: kernel, dilated, dilation


@register("LSKA", channels=rules.same_width, kind="attention", paper=PAPER)
class LSKA(nn.Module):
    """x · conv1x1 of row, column, dilated row, dilated column (equations 8 to 11 of the paper).

    Args:
        dim: channels in and out.
        k_size: the field, one of 7, 11, 23, 35, 41, 53 (px).

    Raises:
        ValueError: another field.
    """

    def __init__(self, dim: int, k_size: int = 23) -> None:
        super().__init__()
        if k_size not in KERNELS:
            raise ValueError(f"LSKA: k_size {k_size} should be one of {list(KERNELS)}")
        near, far, dilation = KERNELS[k_size]
        self.conv0h = depthwise(dim, (1, near))
        self.conv0v = depthwise(dim, (near, 1))
        self.conv_spatial_h = depthwise(dim, (1, far), dilation=dilation)
        self.conv_spatial_v = depthwise(dim, (far, 1), dilation=dilation)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.conv1(self.conv_spatial_v(self.conv_spatial_h(self.conv0v(self.conv0h(x)))))


@register("LSKAAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class LSKAAttention(GatedResidual):
    """LSKA between two pointwise convolutions, with a residual.

    Args:
        d_model: channels in and out.
        k_size: see LSKA.
    """

    def __init__(self, d_model: int, k_size: int = 23) -> None:
        super().__init__(d_model, LSKA(d_model, k_size))
