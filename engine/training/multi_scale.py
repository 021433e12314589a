"""Multi-scale training: the side of every batch depends on its key alone, so that a resumed run draws the same sides."""

from __future__ import annotations

import math
import random

from torch import Tensor
from torch.nn import functional

SHORTEST, LONGEST = 0.5, 1.5  # of the base side


def rescale(images: Tensor, *, base_px: int, stride: int, key: tuple[int, ...]) -> Tensor:
    """Resizes images (B, C, H, W) to a longer side between half and one and a half of ``base_px``, a multiple of the stride.

    Args:
        key: such as (seed, epoch, iteration); the same key gives the same side.
    """
    side = random.Random(repr(key)).randint(_strides(base_px, stride, SHORTEST), _strides(base_px, stride, LONGEST)) * stride
    factor = side / max(images.shape[2:])
    hw = [math.ceil(s * factor / stride - 1e-9) * stride for s in images.shape[2:]]
    return functional.interpolate(images, size=hw, mode="bilinear", align_corners=False)


def longest_side(base_px: int, *, stride: int) -> int:
    """The longest side in px that ``rescale`` returns."""
    return _strides(base_px, stride, LONGEST) * stride


def _strides(base_px: int, stride: int, factor: float) -> int:
    return max(round(base_px * factor / stride), 1)
