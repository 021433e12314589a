"""Second-order channel attention: channel weights from the covariance of the channels, not from their means."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import full_precision
from models.spec import channel_rules as rules
from models.spec.registry import register

ITERATIONS = 5  # of Newton and Schulz, as published


@register(
    "SOCA", channels=rules.same_width, kind="attention", paper="Second-order Attention Network for Single Image Super-Resolution, CVPR 2019"
)
class SOCA(nn.Module):
    """x · σ(W₂ ReLU(W₁ mean(√cov(x)))) (equations 6 to 13 of the paper), the root by five Newton-Schulz steps in float32.

    The published code crops maps above 1000 px; here the whole map is used. On a map of one pixel the covariance is 0 and so is its root.

    Args:
        channel: channels in and out.
        reduction: the hidden width is ``channel // reduction``, at least 1.
    """

    def __init__(self, channel: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(1, channel // reduction)
        self.conv_du = nn.Sequential(nn.Conv2d(channel, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channel, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        with full_precision(x):
            pooled = matrix_root(covariance(x.float())).mean(1)  # (B, C)
        return x * self.conv_du(pooled.to(x.dtype)[:, :, None, None])


def covariance(x: Tensor) -> Tensor:
    """Between channels, over the pixels: (B, C, H, W) -> (B, C, C)."""
    pixels = x.flatten(2)
    centred = pixels - pixels.mean(2, keepdim=True)
    centred = centred / torch.ones_like(pixels[:1, :1]).sum().sqrt()
    return centred @ centred.transpose(1, 2)


def matrix_root(matrix: Tensor) -> Tensor:
    """Square root of symmetric positive semi-definite matrices (B, C, C) by Newton-Schulz steps, scaled by the trace before and after."""
    size = matrix.shape[-1]
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-12)[:, None, None]
    three = 3.0 * torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    root = matrix / trace
    inverse = 0.5 * (three - root)
    root = root @ inverse
    for _ in range(ITERATIONS - 2):
        step = 0.5 * (three - inverse @ root)
        root, inverse = root @ step, step @ inverse
    return 0.5 * root @ (three - inverse @ root) * trace.sqrt()
