"""Heads of classifiers: one row of logits for the whole image, from the last map, or maps, of a network.

The head of the published YOLO classifiers, and those of the published backbones whose whole networks are classifiers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from models.heads.base import Deployed, Head, HeadOutput, Loss, ParameterPart
from models.layers.conv import Conv
from models.losses.cross_entropy import ClassificationLoss
from models.spec import channel_rules as rules
from models.spec.channel_rules import HeadForm
from models.spec.registry import register
from tasks import CLASSIFY
from utils.errors import UserError, nearest
from utils.types import Predictions

if TYPE_CHECKING:
    from utils.config import Hyperparameters

HIDDEN = 1280  # width before the linear layer, as EfficientNet-B0 has it; the same at every scale
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda c: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "layer": nn.LayerNorm,
    "group": lambda c: nn.GroupNorm(1, c),
}
SPREAD = 0.02  # of a published backbone's classifier at the start


class WholeImageHead(Head):
    """Base of heads with logits for the whole image: raw maps are one of (B, nc, 1, 1), and the score is their softmax."""

    task = CLASSIFY
    mean_loss = True
    norm_settings: ClassVar[Literal["all", "rows", "none"]] = "none"

    def __init__(self, nc: int, channels: Sequence[int]) -> None:
        """
        Args:
            nc: number of classes.
            channels: width of each input; several are joined, so that they must have one height and width.

        Raises:
            UserError: no class, or no input.
        """
        super().__init__()
        if nc < 1 or not channels:
            raise UserError(f"nc {nc} with {len(channels)} inputs: a head needs at least one class and one input")
        self.nc, self.inputs, self.strides = nc, len(channels), ()

    def logits(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, nc)."""
        raise NotImplementedError

    def forward(self, features: Sequence[Tensor]) -> HeadOutput:
        """Maps (B, C_i, H, W) of one size to logits (B, nc, 1, 1)."""
        joined = features[0] if len(features) == 1 else torch.cat(tuple(features), dim=1)
        return HeadOutput(((self.logits(joined)[..., None, None],),))

    def decode(self, output: HeadOutput) -> Predictions:
        """Softmax scores (B, 1, nc), with an empty box (B, 1, 4) for the whole image, whose size a head does not know."""
        scores = output.main[0].flatten(1).softmax(dim=1)[:, None]  # (B, 1, nc)
        return Predictions(scores.new_zeros(len(scores), 1, 4), scores)

    def build_loss(self, hyp: Hyperparameters) -> Loss:
        return ClassificationLoss(hyp, nc=self.nc)

    def deploy(self) -> Deployed:
        return Deployed(self, list(range(self.inputs)))

    def set_strides(self, strides: Sequence[float]) -> None:
        """Stores the strides; nothing depends on them."""
        self.strides = tuple(float(s) for s in strides)


@register("Classify", channels=rules.head, kind="head")
class Classify(WholeImageHead):
    """1×1 convolution to 1280 channels, mean over the map, dropout, linear layer: the published classifiers of YOLOv5, v8, 11 and 26."""

    def __init__(self, nc: int, channels: Sequence[int], *, dropout: float = 0.0) -> None:
        """
        Args:
            nc: number of classes.
            channels: width of each input.
            dropout: share of the 1280 values that is left out in training.
        """
        super().__init__(nc, channels)
        self.conv = Conv(sum(channels), HIDDEN)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(p=dropout)
        self.linear = nn.Linear(HIDDEN, nc)

    @classmethod
    def for_row(cls, *, anchors: Any, dialect: str, form: HeadForm) -> type[Classify]:
        """YOLOv5's files set the batch norms of the rows, the newer ones none."""
        return YOLOv5Classify if dialect == "v5" else cls

    def logits(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(self.pool(self.conv(x)).flatten(1)))

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        return {
            "conv": ParameterPart("pooled features", by_level=False),
            "linear": ParameterPart("class", by_level=False, channels={"class": slice(None)}),
        }


class YOLOv5Classify(Classify):
    """The same within a network of YOLOv5, which makes the head after it has set eps and momentum of all batch norms."""

    norm_settings = "rows"


@register("PooledClassify", channels=rules.head, kind="head")
class PooledClassify(WholeImageHead):
    """Normalisation, mean over the map, linear layer: the classifiers of FocalNet (layer), BiFormer (batch) and CloFormer (group).

    The parameters have the published names, ``norm`` and ``head``.
    """

    def __init__(self, nc: int, channels: Sequence[int], *, norm: str = "layer", dropout: float = 0.0) -> None:
        """
        Args:
            nc: number of classes.
            channels: width of each input.
            norm: ``layer``, ``batch``, ``group`` (over all channels and places of an image) or ``none``.
            dropout: share of the values before the linear layer that is left out in training.

        Raises:
            UserError: another norm.
        """
        super().__init__(nc, channels)
        if norm not in NORMS:
            raise UserError(f"norm {norm!r}: unknown, {nearest(str(norm), NORMS) or 'known are ' + ', '.join(NORMS)}")
        width = sum(channels)
        self.norm = NORMS[norm](width)
        self.channels_last = norm == "layer"
        self.drop = nn.Dropout(p=dropout)
        self.head = nn.Linear(width, nc)
        nn.init.trunc_normal_(self.head.weight, std=SPREAD)
        nn.init.zeros_(self.head.bias)

    def logits(self, x: Tensor) -> Tensor:
        normed = self.norm(x.movedim(1, -1)).movedim(-1, 1) if self.channels_last else self.norm(x)
        return self.head(self.drop(normed.flatten(2).mean(dim=2)))

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        return {
            "norm": ParameterPart("last norm", by_level=False),
            "head": ParameterPart("class", by_level=False, channels={"class": slice(None)}),
        }
