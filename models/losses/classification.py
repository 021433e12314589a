"""Class losses for soft targets: binary cross entropy, focal, quality focal and varifocal loss, by name.

With x a logit, p its sigmoid, t the target and BCE(x, t) = −w t log p − (1 − t) log(1 − p):

=====  ============================================  ==========================
BCE    BCE(x, t), w = ``pos_weight``
focal  a_t (1 − p_t)^γ BCE(x, t),                    arXiv 1708.02002, eq. 5
       p_t = t p + (1 − t)(1 − p), a_t = t a + (1 − t)(1 − a), a = 0.25
QFL    \\|t − p\\|^γ BCE(x, t)                         arXiv 2006.04388, eq. 8
VFL    t BCE(x, t) where t > 0,                      arXiv 2008.13367, eq. 2
       0.75 p^γ BCE(x, 0) elsewhere
=====  ============================================  ==========================

For t = 0 each is a weight times p^γ · −log(1 − p): the background loss of ``cells.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError, nearest

NAMES = ("BCE", "focal", "QFL", "VFL")
DEFAULT_GAMMA = 2.0
FOCAL_ALPHA = 0.25
VARIFOCAL_ALPHA = 0.75


class ClassLoss:
    """One of the class losses, element by element.

    Args:
        name: one of ``NAMES``.
        gamma: exponent of the focal weight; 0 means 2, except for BCE, which becomes the focal loss if there is one (``fl_gamma``).
        pos_weight: weight w of the positive term.
        class_weights: factor of each class's losses; empty for none.

    Raises:
        UserError: an unknown name.
    """

    def __init__(self, name: str = "BCE", *, gamma: float = 0.0, pos_weight: float = 1.0, class_weights: Sequence[float] = ()) -> None:
        if name not in NAMES:
            raise UserError(f"cls_loss {name!r}: unknown, {nearest(name, NAMES) or 'known are ' + ', '.join(NAMES)}")
        self.name = "focal" if name == "BCE" and gamma else name
        self.gamma = 0.0 if self.name == "BCE" else gamma or DEFAULT_GAMMA
        self.pos_weight = pos_weight
        self._class_weights = torch.tensor(class_weights) if class_weights else None
        self.background_weight = {"focal": 1 - FOCAL_ALPHA, "VFL": VARIFOCAL_ALPHA}.get(self.name, 1.0)

    def class_weights(self, like: Tensor) -> Tensor | None:
        """The factors (nc, 1) on the device of ``like``, where they stay; None for none."""
        if self._class_weights is not None and self._class_weights.device != like.device:
            self._class_weights = self._class_weights.to(like.device)
        return None if self._class_weights is None else self._class_weights.unsqueeze(1)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses of any shape."""
        loss = F.softplus(logits) - logits * targets
        if self.pos_weight != 1:
            loss = loss + (self.pos_weight - 1) * targets * F.softplus(-logits)
        if self.name == "BCE":
            return loss
        p = logits.sigmoid()
        if self.name == "focal":
            p_t = targets * p + (1 - targets) * (1 - p)
            weight = (targets * FOCAL_ALPHA + (1 - targets) * (1 - FOCAL_ALPHA)) * (1 - p_t) ** self.gamma
        elif self.name == "QFL":
            weight = (targets - p).abs() ** self.gamma
        else:
            weight = torch.where(targets > 0, targets, VARIFOCAL_ALPHA * p**self.gamma)
        return loss * weight

    def over_background(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The difference that targets make to the loss of logits already counted as background."""
        if self.name == "BCE" and self.pos_weight == 1:
            return -logits * targets
        return self(logits, targets) - self(logits, torch.zeros_like(targets))


def check_class_weights(weights: Sequence[float], nc: int) -> None:
    """Raises UserError where there are weights, and not one for each class."""
    if weights and len(weights) != nc:
        raise UserError(f"cls_weights: expected one number for each of the {nc} classes, got {len(weights)}")
