"""Losses of a box's sides beside that of its overlap: for sides that are distributions, and for plain distances."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distribution_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy to the two bins on either side of a real-valued distance (arXiv 2006.04388, equation 6).

    −((y₊ − y) log S(y₋) + (y − y₋) log S(y₊)), with y₋ ≤ y < y₊ = y₋ + 1 and S the softmax over the bins.

    Args:
        logits: (..., bins).
        targets: (...) distances in bins; brought into 0 … bins − 1.01, so that both neighbours exist.

    Returns:
        (...) losses.
    """
    bins = torch.arange(logits.shape[-1], device=logits.device)
    y = targets.clamp(0, logits.shape[-1] - 1 - 0.01)
    weights = (1 - (bins - y[..., None]).abs_()).clamp_(min=0)  # y₊ − y and y − y₋ at the two bins, 0 at all others
    return -(F.log_softmax(logits, dim=-1) * weights).sum(dim=-1)


def relative_side_distance(distances: Tensor, targets: Tensor, *, strides: Tensor, image_hw: tuple[float, float]) -> Tensor:
    """L1 distance of plain sides relative to the image: left and right in image widths, top and bottom in image heights.

    Args:
        distances: (..., 4) left, top, right, bottom in strides.
        targets: (..., 4), likewise.
        strides: (..., 4) px.
        image_hw: px.

    Returns:
        (...) means over the sides.
    """
    h, w = image_hw
    across, down = ((distances - targets).abs() * strides).unflatten(-1, (2, 2)).sum(dim=-2).unbind(dim=-1)
    return (across / w + down / h) / 4
