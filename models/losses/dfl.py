"""Distribution focal loss: cross entropy to the two bins on either side of a real-valued distance (arXiv 2006.04388, equation 6)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distribution_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """−((y₊ − y) log S(y₋) + (y − y₋) log S(y₊)), with y₋ ≤ y < y₊ = y₋ + 1 and S the softmax over the bins.

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
