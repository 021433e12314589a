"""Training at changing sizes: the side of every batch hangs on its key alone, so that a resume draws the same."""

from __future__ import annotations

import math
import random

from torch import Tensor
from torch.nn import functional

LEAST, MOST = 0.5, 1.5  # of the base

def rescaled(images: Tensor, *, base_px: int, stride: int, key: tuple[int, ...]) -> Tensor:
    """Images (B, C, H, W) at a longer side between half and one and a half of ``base_px``, in whole strides.

    Args:
        key: such as (seed, epoch, iteration); the same key gives the same side.
    """
    side = random.Random(repr(key)).randint(_strides(base_px, stride, LEAST), _strides(base_px, stride, MOST)) * stride
    factor = side / max(images.shape[2:])
    hw = [math.ceil(s * factor / stride - 1e-9) * stride for s in images.shape[2:]]
    return functional.interpolate(images, size=hw, mode="bilinear", align_corners=False)


def longest_side(base_px: int, *, stride: int) -> int:
    """The longest side in px that ``rescaled`` gives."""
    return _strides(base_px, stride, MOST) * stride


def _strides(base_px: int, stride: int, factor: float) -> int:
    return max(round(base_px * factor / stride), 1)
