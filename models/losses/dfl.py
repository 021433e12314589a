"""Losses of a box's sides beside that of its overlap: for sides that are distributions, and for plain distances."""

from __future__ import annotations

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
    y = targets.clamp(0, logits.shape[-1] - 1 - 0.01)
    low = y.floor()
    upper_weight = y - low
    log_s = F.log_softmax(logits, dim=-1)
    index = low.long().unsqueeze(-1)
    at_low, at_high = log_s.gather(-1, index).squeeze(-1), log_s.gather(-1, index + 1).squeeze(-1)
    return -(at_low * (1 - upper_weight) + at_high * upper_weight)


def relative_side_distance(distances: Tensor, targets: Tensor, *, strides: Tensor, image_hw: tuple[float, float]) -> Tensor:
    """L1 distance of plain sides relative to the image: left and right in image widths, top and bottom in image heights.

    Args:
        distances: (B, 4, K) left, top, right, bottom in strides.
        targets: (B, 4, K), likewise.
        strides: (B, 1, K) px.
        image_hw: px.

    Returns:
        (B, K) means over the sides.
    """
    h, w = image_hw
    error = (distances - targets).abs() * strides
    across, down = error[:, 0::2].sum(dim=1), error[:, 1::2].sum(dim=1)
    return (across / w + down / h) / 4
