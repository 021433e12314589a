"""Class losses for soft targets, element by element."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def binary_cross_entropy(logits: Tensor, targets: Tensor | None) -> Tensor:
    """−t log p − (1 − t) log(1 − p) with p the sigmoid of the logit; any shape. None stands for targets that are all 0."""
    return F.softplus(logits) if targets is None else F.softplus(logits) - logits * targets
