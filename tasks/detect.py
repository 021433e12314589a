"""Object detection: axis-aligned boxes with a class and a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.base import CommonTask, DrawStyle, ExportOutput, TaskDefaults, register_task
from tasks.rows import COLUMNS, NO_AREA, NO_POLYGON, OUT_OF_RANGE, InvalidRow, LabelRow, parse_numbers
from utils.boxes import (
    box_iou,
    cxcywh_to_xyxy,
    denormalised,
    ltwh_to_xyxy,
    normalised,
    to_batch,
    to_original,
    xyxy_to_cxcywh,
    xyxy_to_ltwh,
)
from utils.instances import Instances
from utils.metrics.columns import METRIC_COLUMNS
from utils.metrics.metrics import GroundTruth, MetricAccumulator, Metrics
from utils.nms import Suppression, non_max_suppression
from utils.types import Batch, Detections, Letterbox, Predictions, Targets, detections_on_host, split_detections

POSE_HINT = "; pose labels need kpt_shape in the dataset file"
SAME_OBJECT_IOU = 0.7  # a detection that overlaps an object of its class more is that object


class DetectTask(CommonTask):
    """Axis-aligned boxes. A label row with a polygon is taken too: augmentation keeps its box tight."""

    name = "detect"
    expected_row = "class cx cy w h, or class x1 y1 x2 y2 x3 y3 … (a polygon)"
    coco_type: str | None = "bbox"
    defaults = TaskDefaults()
    outputs: tuple[ExportOutput, ...] = (ExportOutput("output0", {0: "batch", 2: "boxes"}, {"boxes": 1e-3, "scores": 1e-4}),)

    @property
    def columns(self) -> tuple[str, ...]:
        """The four of every YOLO, and those that a plugin has registered."""
        return tuple(METRIC_COLUMNS)

    def parse_row(self, values: Sequence[str]) -> LabelRow | InvalidRow:
        """Class and box (5 columns), or class and polygon (7 or more, an odd number); coordinates just outside 0-1 are clipped."""
        count = len(values)
        hint = POSE_HINT if count > 5 and count % 3 == 2 else ""  # 5 columns and three for each keypoint
        if count != 5 and (count < 7 or count % 2 == 0):
            return InvalidRow(f"{count} columns, expected: {self.expected_row}{hint}", COLUMNS)
        numbers = parse_numbers(values, self.expected_row)
        if isinstance(numbers, InvalidRow):
            return numbers._replace(message=numbers.message + hint * (numbers.kind == OUT_OF_RANGE))
        if count == 5:
            if not (numbers[3:] > 0).all():
                return InvalidRow("a box without area, dropped", NO_AREA, False)
            return LabelRow(int(numbers[0]), numbers[1:], NO_POLYGON)
        polygon = numbers[1:].reshape(-1, 2)
        low, high = polygon.min(0), polygon.max(0)
        if not (high - low > 0).all() or len(np.unique(polygon, axis=0)) < 3:
            return InvalidRow("a polygon without area, dropped", NO_AREA, False)
        return LabelRow(int(numbers[0]), np.concatenate(((low + high) / 2, high - low)), polygon)

    def targets(self, instances: Instances, hw: tuple[int, int]) -> Mapping[str, NDArray]:
        """Classes (n,) and boxes (n, 4) cxcywh in 0-1."""
        h, w = hw
        b = instances.boxes_xyxy / np.array((w, h, w, h), np.float32)
        boxes = np.concatenate(((b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]), 1).astype(np.float32)
        return {"classes": instances.classes, "boxes": boxes}

    def ground_truth(self, batch: Batch) -> GroundTruth:
        """The boxes of a batch in px of the original images; their area is the box's, and none is a crowd."""
        targets, hw = batch.targets.cpu(), batch.images.shape[-2:]
        boxes = cxcywh_to_xyxy(denormalised(targets.boxes, (float(hw[0]), float(hw[1]))))
        boxes = to_original(boxes, batch.letterbox, image=targets.image)
        return GroundTruth.of_boxes(targets.image, targets.classes, xyxy_to_ltwh(boxes.double()))

    @staticmethod
    def truth_of_originals(instances: Sequence[Instances], boxes_xyxy: Sequence[NDArray]) -> GroundTruth:
        """The objects of images with these boxes (n, 4) px of the originals, one array an image."""
        image = torch.arange(len(instances)).repeat_interleave(torch.tensor([len(i) for i in instances], dtype=torch.long))
        boxes = torch.from_numpy(np.concatenate([np.zeros((0, 4), np.float32), *boxes_xyxy])).double()
        classes = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(i.classes for i in instances)])).long()
        return GroundTruth.of_boxes(image, classes, xyxy_to_ltwh(boxes))

    def postprocess(self, predictions: Predictions, suppression: Suppression) -> list[Detections]:
        return non_max_suppression(predictions, suppression)

    def to_original(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        return map_boxes(detections_on_host(detections), partial(to_original, letterbox=letterbox))

    def to_batch(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        return map_boxes(detections, partial(to_batch, letterbox=letterbox))

    def metric(self, names: Sequence[str], *, rule: str = "coco") -> MetricAccumulator:
        return MetricAccumulator(names, rule=rule)

    def add_truth(self, detections: Detections, truth: GroundTruth, *, image: int) -> Detections:
        rows = truth.image == image
        classes, boxes = truth.classes[rows], ltwh_to_xyxy(truth.boxes_ltwh[rows]).to(detections.boxes)
        same = (box_iou(detections.boxes, boxes) > SAME_OBJECT_IOU) & (detections.classes[:, None] == classes)  # (n, m)
        objects = Detections(boxes, torch.ones(len(classes)).to(detections.scores), classes, self.truth_fields(truth, rows))
        others = detections[~same.any(dim=1)]
        return Detections.cat([objects, others.replace(fields={name: others.fields[name] for name in objects.fields})])

    def truth_fields(self, truth: GroundTruth, rows: Tensor) -> Mapping[str, Tensor]:
        """What objects have besides boxes and classes, as detections have it; ``rows`` is a mask of the ground truth."""
        return {}

    def plot(self, result: Metrics, folder: Path) -> None:
        """Precision, recall and F1 curves and the confusion matrix."""
        from utils.visual.plots import plot_confusion, plot_curves

        plot_curves(result, folder)
        plot_confusion(result.confusion, result.names, folder / "confusion_matrix.png")

    def detections_of_targets(self, targets: Targets, hw: tuple[int, int], *, count: int) -> list[Detections]:
        boxes = cxcywh_to_xyxy(denormalised(targets.boxes, (float(hw[0]), float(hw[1]))))
        together = Detections(boxes, torch.ones(len(targets)), targets.classes)
        return [together[targets.image == image] for image in range(count)]

    def draw(self, image_rgb: NDArray[np.uint8], detections: Detections, names: Sequence[str], style: DrawStyle) -> NDArray[np.uint8]:
        from utils.visual.draw import draw_detections

        return draw_detections(
            image_rgb, detections, names, line_thickness=style.line_thickness, hide_labels=style.hide_labels, hide_conf=style.hide_conf
        )

    def label_rows(self, detections: Detections, hw: tuple[int, int], *, with_confidence: bool = False) -> list[str]:
        """``class cx cy w h`` in 0-1, and the score if asked for."""
        boxes = normalised(xyxy_to_cxcywh(detections.boxes), (hw[0], hw[1])).tolist()
        rows = []
        for box, score, label in zip(boxes, detections.scores.tolist(), detections.classes.tolist()):
            values = (*box, score) if with_confidence else box
            rows.append(" ".join([str(label), *(f"{value:.6g}" for value in values)]))
        return rows

    def result_rows(self, detections: Detections, hw: tuple[int, int], *, names: Sequence[str], with_confidence: bool = False) -> list[str]:
        return self.label_rows(detections, hw, with_confidence=with_confidence)

    def summary(self, detections: Detections, names: Sequence[str]) -> str:
        return ", ".join(f"{int(n)} {names[label]}" for label, n in enumerate(detections.classes.bincount()) if n)

    def to_export(self, predictions: Predictions) -> tuple[Tensor, ...]:
        """(B, 4 + nc, N): centre, width and height in px, then scores."""
        return (torch.cat((xyxy_to_cxcywh(predictions.boxes), predictions.scores), dim=2).transpose(1, 2),)

    def from_export(self, tensors: Sequence[Tensor], *, nc: int) -> Predictions:
        if len(tensors) != 1 or tensors[0].ndim != 3 or tensors[0].shape[1] != 4 + nc:
            raise ValueError(f"one output (batch, {4 + nc}, boxes) is needed for {nc} classes")
        boxes_cxcywh, scores = tensors[0].float().transpose(1, 2).split((4, nc), dim=2)  # (B, N, 4), (B, N, nc)
        return Predictions(cxcywh_to_xyxy(boxes_cxcywh), scores)

    def class_count(self, output_shapes: Sequence[Sequence[int | None]]) -> int:
        rows = output_shapes[0][1] if output_shapes and len(output_shapes[0]) == 3 else None
        return max(rows - 4, 0) if rows is not None else 0


def map_boxes(detections: Sequence[Detections], move: Callable[..., Tensor]) -> list[Detections]:
    """Detections of a batch with boxes in other coordinates; ``move`` takes all boxes at once, and which image each is on."""
    return map_detections(detections, lambda together, image: together.replace(boxes=move(together.boxes, image=image)))


def map_detections(detections: Sequence[Detections], move: Callable[..., Detections]) -> list[Detections]:
    """Detections of a batch, moved; ``move`` takes all of them joined, and as ``image`` which image each is on."""
    if not detections:
        return []
    counts = [len(d) for d in detections]
    image = torch.arange(len(detections)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    return split_detections(move(Detections.cat(detections), image=image), counts)


DETECT = register_task(DetectTask())
