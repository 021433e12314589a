"""Intersection over union of masks."""

from __future__ import annotations

from torch import Tensor


def mask_iou(first: Tensor, second: Tensor, *, eps: float = 1e-7) -> Tensor:
    """IoU (n, m) of binary masks (n, h, w) and (m, h, w); 0 where both are empty."""
    a, b = first.flatten(1).float(), second.flatten(1).float()
    shared = a @ b.T
    either = a.sum(1, keepdim=True) + b.sum(1) - shared
    return shared / (either + eps)
