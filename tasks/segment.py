"""Instance segmentation: objects with a box and a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.base import ExportOutput, register_task
from tasks.detect import DetectTask
from utils.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from utils.types import Predictions


class SegmentTask(DetectTask):
    """Boxes with masks."""

    name = "segment"
    coco_type = "segm"
    outputs = (
        ExportOutput("output0", {0: "batch", 2: "boxes"}, {"boxes": 1e-3, "scores": 1e-4, "coefficients": 1e-3}),
        ExportOutput("output1", {0: "batch", 2: "height", 3: "width"}, {"prototypes": 1e-3}),
    )

    def to_export(self, predictions: Predictions) -> tuple[Tensor, ...]:
        """(B, 4 + nc + nm, N): centre, width and height in px, scores, coefficients; and prototypes (B, nm, h, w)."""
        parts = (xyxy_to_cxcywh(predictions.boxes), predictions.scores, predictions.fields["coefficients"])
        return torch.cat(parts, dim=2).transpose(1, 2), predictions.shared["prototypes"]

    def from_export(self, tensors: Sequence[Tensor], *, nc: int) -> Predictions:
        """The inverse of ``to_export``."""
        box, scores, coefficients = tensors[0].transpose(1, 2).split((4, nc, tensors[1].shape[1]), dim=2)
        return Predictions(cxcywh_to_xyxy(box), scores, {"coefficients": coefficients}, {"prototypes": tensors[1]})


SEGMENT = register_task(SegmentTask())
