"""YOLOv5's segmentation head: every anchor of every cell predicts mask coefficients besides, behind its classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from models.heads.anchor_based import AnchorDetect
from models.heads.base import Deployed, HeadOutput, Loss, ParameterPart
from models.layers.prototypes import NearestPrototypes
from models.losses.anchor_segment import AnchorSegmentLoss
from models.losses.segment import COEFFICIENTS, PROTOTYPES
from tasks.segment import SEGMENT
from utils.types import Predictions

if TYPE_CHECKING:
    from utils.config import Hyperparameters


class AnchorSegment(AnchorDetect):
    """YOLOv5's ``Segment``: raw maps are (B, anchors · (5 + nc + masks), H, W), the prototypes come from the first level."""

    task = SEGMENT

    def __init__(
        self, nc: int, anchors: Sequence[Sequence[float]] | int, channels: Sequence[int], *, masks: int = 32, hidden: int = 256
    ) -> None:
        """
        Args:
            nc: number of classes.
            anchors: for each level width, height, width, height … in px; or the number per cell.
            channels: width of each input.
            masks: number of prototypes.
            hidden: width of the convolutions before them.

        Raises:
            UserError: as :class:`AnchorDetect`.
        """
        self.further_outputs = masks
        super().__init__(nc, anchors, channels)
        self.proto = NearestPrototypes(channels[0], hidden, masks)

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        return {**super().parameter_parts(), "proto": ParameterPart("prototypes", by_level=False)}

    def forward(self, features: Sequence[Tensor]) -> HeadOutput:
        """Feature maps (B, C_i, H_i, W_i) to raw maps and prototypes (B, masks, 2 H_0, 2 W_0)."""
        return super().forward(features)._replace(shared={PROTOTYPES: self.proto(features[0])})

    def _with_further(self, predictions: Predictions, further: Tensor, output: HeadOutput) -> Predictions:
        return predictions.replace(fields={COEFFICIENTS: further}, shared={PROTOTYPES: output.shared[PROTOTYPES].float()})

    def build_loss(self, hyp: Hyperparameters) -> Loss:
        return AnchorSegmentLoss(hyp, self._gains(hyp), masks=self.further_outputs, **self._loss_options(hyp))

    def deploy(self) -> Deployed:
        return super().deploy()._replace(name="Segment")
