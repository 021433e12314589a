"""Sides of images in whole strides of a network, and the largest sizes that are accepted."""

from __future__ import annotations

import math

MAX_SIDE_PX = 16384  # of a network's input
MAX_WORKERS = 1024  # loader processes


def round_up_to_stride(px: float, stride: int) -> int:
    """The smallest multiple of ``stride`` that is at least ``px`` and at least one stride, in px."""
    return max(math.ceil(px / stride), 1) * stride
