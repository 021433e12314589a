"""Several models as one: the predictions of all go through one suppression together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.inference.class_order import in_order_of, shortened
from utils.errors import UserError
from utils.types import Predictions

if TYPE_CHECKING:
    from engine.inference.predictor import Network
    from models.export.model import ExportedModel
    from models.model import Model


class Ensemble:
    """Models of the same classes whose predictions are joined; suppression unites what they agree on.

    Classes in another order than the first model's are matched by name.

    Args:
        models: two or more.
        sources: their files, for messages.

    Raises:
        UserError: they differ in classes or in input channels.
    """

    def __init__(self, models: Sequence[Model | ExportedModel], *, sources: Sequence[str]) -> None:
        first = models[0]
        members: list[Network] = []
        for model, source in zip(models, sources):
            member = in_order_of(model, first.names) if model.nc == first.nc else None
            if member is None:
                theirs = f"{shortened(model.names)}; {shortened(first.names)}"
                raise UserError(f"--weights: {source} knows other classes than {sources[0]} ({theirs})")
            if model.ch != first.ch:
                raise UserError(f"--weights: {source} takes images of {model.ch} channels, {sources[0]} of {first.ch}")
            if model.task.name != first.task.name:
                raise UserError(f"--weights: {source} is for the task {model.task.name!r}, {sources[0]} for {first.task.name!r}")
            members.append(member)
        self.models = tuple(members)
        self.names, self.nc, self.ch, self.task = first.names, first.nc, first.ch, first.task
        self.stride = max(model.stride for model in models)
        fixed = [(m, s) for m, s in zip(models, sources) if not getattr(m, "dynamic", True)]
        self.dynamic = not fixed
        if fixed:
            self.path, self.imgsz = fixed[0][1], fixed[0][0].imgsz
        for model, source in fixed:
            if model.imgsz != self.imgsz:
                raise UserError(f"--weights: {source} and {self.path} were made for different sizes; export them with --dynamic")

    @torch.no_grad()
    def predict(self, images: Tensor, *, above: float = 0.0) -> Predictions:
        """Boxes (B, N of all models, 4) xyxy px and scores (B, N, nc) for images (B, ch, H, W) in 0-1."""
        found = [model.predict(images, above=above) for model in self.models]
        return self.task.join(found)
