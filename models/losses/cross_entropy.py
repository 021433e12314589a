"""The loss of classifiers: cross entropy of the whole image's class, with label smoothing and class weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from models.losses.classification import check_class_weights
from utils.distributed import world_size
from utils.types import Batch

if TYPE_CHECKING:
    from models.heads.base import HeadOutput
    from utils.config import Hyperparameters


class ClassificationLoss:
    """Mean cross entropy over the images of a batch; an image without a class counts nowhere.

    With label smoothing s the target is 1 - s + s / nc for the true class and s / nc for the others (arXiv 1512.00567, section 7). With
    class weights the loss of an image is multiplied by the weight of its class, and the mean is over the images, not over the weights.

    Args:
        hyp: ``label_smoothing``, ``cls_weights``.
        nc: number of classes.

    Raises:
        UserError: there are class weights, and not one for each class.
    """

    names = ("cls",)

    def __init__(self, hyp: Hyperparameters, *, nc: int) -> None:
        check_class_weights(hyp.cls_weights, nc)
        self.nc, self.label_smoothing = nc, hyp.label_smoothing
        self._weights = torch.tensor(hyp.cls_weights) if hyp.cls_weights else None

    def __call__(self, output: HeadOutput, batch: Batch) -> dict[str, Tensor]:
        """The one part; ``output`` holds logits (B, nc, 1, 1)."""
        logits = output.main[0].flatten(1).float()  # (B, nc)
        targets = batch.targets
        per_image = F.cross_entropy(logits[targets.image], targets.classes, reduction="none", label_smoothing=self.label_smoothing)
        if self._weights is not None:
            self._weights = self._weights.to(logits.device)  # moved once
            per_image = per_image * self._weights[targets.classes]
        total = per_image.sum() + 0 * logits.sum()  # a gradient, also without any class
        return {"cls": total * world_size() / max(batch.images_of_step, 1)}  # ranks average gradients, so this is the mean over all

    def compile(self, *, backend: str) -> str:
        """Nothing here takes time."""
        return ""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """No schedule."""
