"""Image sizes that a network accepts: whole multiples of its stride."""

from __future__ import annotations


def round_up_to_stride(px: int, stride: int) -> int:
    """The least multiple of ``stride`` that is at least ``px``."""
    return -(-px // stride) * stride
