"""Deformable large kernel attention: the large kernel's taps move with the content.

Beyond Self-Attention: Deformable Large Kernel Attention for Medical Image Segmentation, arXiv 2309.00121.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import full_precision
from models.layers.attention.ops.shared import GatedResidual, depthwise, gather_bilinear
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Beyond Self-Attention: Deformable Large Kernel Attention for Medical Image Segmentation, arXiv 2309.00121"


@register("DeformableLKA", "deformable_LKA", channels=rules.same_width, kind="attention", paper=PAPER)
class DeformableLKA(nn.Module):
    """x · conv1x1(deformable dilated 7x7(deformable 5x5(x))), both depth-wise (equation 5 of the paper).

    Args:
        dim: channels in and out.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = DeformableDepthwise(dim, 5)
        self.conv_spatial = DeformableDepthwise(dim, 7, dilation=3)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


@register("DeformableLKAAttention", "DLKA", channels=rules.same_width, kind="attention", paper=PAPER)
class DeformableLKAAttention(GatedResidual):
    """DeformableLKA between two pointwise convolutions, with a residual.

    Args:
        d_model: channels in and out.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, DeformableLKA(d_model))


class DeformableDepthwise(nn.Module):
    """A depth-wise convolution whose taps move by offsets that an ordinary convolution of the same shape predicts.

    Sampling is bilinear in float32, zero outside. ONNX before opset 19 has no such operator, and the fast kernel's gradient on CUDA
    adds in any order; for export and for deterministic training four gathers a row of taps replace it.
    """

    def __init__(self, channels: int, kernel: int, *, dilation: int = 1) -> None:
        super().__init__()
        importlib.import_module("torchvision.ops")  # not above: few networks need it, and it takes longer than importing torch
        self.kernel, self.dilation, self.margin = kernel, dilation, dilation * (kernel // 2)
        self.offset_net = nn.Conv2d(channels, 2 * kernel**2, kernel, padding=self.margin, dilation=dilation)
        self.deform_conv = depthwise(channels, kernel, dilation=dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        offset = self.offset_net(x)
        plain = torch.onnx.is_in_onnx_export() or (x.is_cuda and torch.are_deterministic_algorithms_enabled())
        with full_precision(x):
            wide, offset, weight = x.float(), offset.float(), self.deform_conv.weight.float()
            if plain:
                return self._by_gathers(wide, offset, weight).to(x.dtype)
            from torchvision.ops import deform_conv2d

            return deform_conv2d(wide, offset, weight, padding=self.margin, dilation=self.dilation).to(x.dtype)

    def _by_gathers(self, x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        """The same sum, one row of taps after the other; offsets are (B, 2 taps, H, W), each tap's row before its column."""
        height, width = x.shape[-2:]
        kernel, dilation, margin = self.kernel, self.dilation, self.margin
        rows = torch.arange(height, device=x.device, dtype=x.dtype)[:, None] - margin
        columns = torch.arange(width, device=x.device, dtype=x.dtype) - margin
        across = dilation * torch.arange(kernel, device=x.device, dtype=x.dtype)[:, None, None]
        total = torch.zeros_like(x)
        for tap_row, moved in enumerate(offset.chunk(kernel, dim=1)):
            row = rows + tap_row * dilation + moved[:, 0::2]  # (B, kernel, H, W)
            column = columns + across + moved[:, 1::2]
            taken = gather_bilinear(x, row.flatten(1, 2), column.flatten(1, 2)).unflatten(2, row.shape[1:3])  # (B, C, kernel, H, W)
            total = total + (taken * weight[:, 0, tap_row].view(1, -1, kernel, 1, 1)).sum(2)
        return total
