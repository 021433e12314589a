"""Sides of images in whole strides of a network."""

from __future__ import annotations

import math


def round_up_to_stride(px: float, stride: int) -> int:
    """The smallest multiple of ``stride`` that is at least ``px`` and at least one stride, in px."""
    return max(math.ceil(px / stride), 1) * stride
