"""Distribution focal loss: cross entropy to the two bins on either side of a real-valued distance (arXiv 2006.04388, equation 6)."""

from __future__ import annotations

import torch
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
    bins = torch.arange(logits.shape[-1], device=logits.device)
    y = targets.clamp(0, logits.shape[-1] - 1 - 0.01)
    weights = (1 - (bins - y[..., None]).abs_()).clamp_(min=0)  # y₊ − y and y − y₋ at the two bins, 0 at all others
    return -(F.log_softmax(logits, dim=-1) * weights).sum(dim=-1)
