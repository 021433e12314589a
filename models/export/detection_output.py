"""How the predictions of a task become the outputs of an exported file; the rest of this folder asks ``task_output``, and knows no task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from utils.errors import UserError
from utils.types import Predictions


@dataclass(frozen=True)
class ExportOutput:
    """One output of an exported file.

    Attributes:
        name: of the graph's output.
        axes: which axes are symbolic in a file of dynamic size, and their names.
        tolerance: largest difference from torch, by part of the output (``boxes`` in px and ``scores``).
    """

    name: str
    axes: Mapping[int, str]
    tolerance: Mapping[str, float]


class DetectionOutput:
    """``output0`` (B, 4 + nc, N): centre, width and height in px, then scores."""

    name = "detect"
    outputs = (ExportOutput("output0", {0: "batch", 2: "boxes"}, {"boxes": 1e-3, "scores": 1e-4}),)

    def to_export(self, predictions: Predictions) -> tuple[Tensor, ...]:
        """Decoded predictions as the tensors of ``outputs``; can be traced."""
        return (torch.cat((xyxy_to_cxcywh(predictions.boxes), predictions.scores), dim=2).transpose(1, 2),)

    def from_export(self, tensors: Sequence[Tensor], *, nc: int) -> Predictions:
        """The inverse of ``to_export``.

        Raises:
            ValueError: the tensors are not of this task.
        """
        if len(tensors) != 1 or tensors[0].ndim != 3 or tensors[0].shape[1] != 4 + nc:
            raise ValueError(f"one output (batch, {4 + nc}, boxes) is needed for {nc} classes")
        boxes_cxcywh, scores = tensors[0].float().transpose(1, 2).split((4, nc), dim=2)  # (B, N, 4), (B, N, nc)
        return Predictions(cxcywh_to_xyxy(boxes_cxcywh), scores)


DETECTION = DetectionOutput()


def task_output(task: str, *, source: object = "export") -> DetectionOutput:
    """The layout of a task's outputs.

    Raises:
        UserError: a task that is not supported.
    """
    if task != DETECTION.name:
        raise UserError(f"{source}: made for the task {task!r}; only detection is supported")
    return DETECTION


def class_count(output_shapes: Sequence[Sequence[int | None]]) -> int:
    """Number of classes that the shape of a foreign file's first output implies; 0 where it implies none."""
    rows = output_shapes[0][1] if output_shapes and len(output_shapes[0]) == 3 else None
    return max(rows - 4, 0) if rows is not None else 0
