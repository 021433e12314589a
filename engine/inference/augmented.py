"""Test-time augmentation: an image is also predicted smaller and mirrored, and all predictions go through one suppression together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.base import View
from utils.errors import UserError
from utils.types import Predictions

if TYPE_CHECKING:
    from engine.inference.predictor import Network

VERSIONS = ((1.0, False), (0.83, True), (0.67, False))  # scale, mirrored: those of YOLOv5 and later
GREY = 114 / 255  # of the border, as in the letterbox


class AugmentedModel:
    """A model whose ``predict`` gives the predictions of every version, in px of the image that came in; suppression unites them.

    Args:
        model: anything with ``predict`` that takes images of any size.

    Raises:
        UserError: an exported file of fixed size, or a task whose results cannot be turned back.
    """

    def __init__(self, model: Network) -> None:
        if not getattr(model, "dynamic", True):
            raise UserError(f"--augment: {getattr(model, 'path', 'the model')} takes one size only; leave it out, or export with --dynamic")
        self.model = model
        self.names, self.nc, self.ch, self.stride, self.task = model.names, model.nc, model.ch, model.stride, model.task
        self.task.from_view(_no_candidates(model), View((model.stride, model.stride), (1.0, 1.0), False))  # refuses before a run begins

    @torch.no_grad()
    def predict(self, images: Tensor, *, above: float = 0.0) -> Predictions:
        """Boxes (B, 3N or so, 4) xyxy px and scores for images (B, ch, H, W) in 0-1."""
        found = [self._version(images, scale, mirrored=mirrored, above=above) for scale, mirrored in VERSIONS]
        return self.task.join(found)

    def _version(self, images: Tensor, scale: float, *, mirrored: bool, above: float) -> Predictions:
        height, width = images.shape[2:]
        new_h, new_w = round(height * scale), round(width * scale)
        version = images.flip(3) if mirrored else images
        if scale != 1:
            version = F.interpolate(version, size=(new_h, new_w), mode="bilinear", align_corners=False)
            version = F.pad(version, (0, -new_w % self.stride, 0, -new_h % self.stride), value=GREY)
        view = View((height, width), (new_w / width, new_h / height), mirrored)
        return self.task.from_view(self.model.predict(version, above=above), view)


def _no_candidates(model: Network) -> Predictions:
    """What a network of this kind predicts where it predicts nothing."""
    task = model.task
    fields = {task.candidate_field: torch.zeros(1, 0, 1)} if task.candidate_field else {}
    shared = {name: torch.zeros(1, 1, 1, 1) for name in task.shared_fields}
    return Predictions(torch.zeros(1, 0, 4), torch.zeros(1, 0, model.nc), fields, shared)
