"""Oriented boxes: boxes that are turned about their centres, with a class and a score.

The angle convention is that of utils/rotated/boxes.py: radians, clockwise as one sees it. Targets have the longer side as width and an
angle in [−π/4, 3π/4); detections leave as their head gives them, and label rows as four corners, which need no convention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.base import DrawStyle, ExportOutput, Shapes, parts_of_rows, register_task, rounded
from tasks.detect import SAME_OBJECT_IOU, DetectTask, map_detections
from tasks.rows import COLUMNS, NO_AREA, OUT_OF_RANGE, InvalidRow, LabelRow, parse_numbers
from utils.boxes import cxcywh_to_xyxy, denormalised, ltwh_to_xyxy, xyxy_to_cxcywh, xyxy_to_ltwh
from utils.errors import UserError
from utils.instances import Instances
from utils.metrics.columns import METRIC_COLUMNS
from utils.metrics.metrics import GroundTruth, MetricAccumulator
from utils.metrics.rotated import PROBIOU_COLUMNS, RotatedAccumulator
from utils.nms import Suppression
from utils.rotated.boxes import corners_of, extents, rescaled, rotated_boxes, unrotated
from utils.rotated.overlap import rotated_area, rotated_intersection, rotated_iou_matrix
from utils.rotated.polygons import ordered_corners, rectangles_of_polygons
from utils.rotated.suppression import rotated_suppression
from utils.types import Batch, Detections, Letterbox, Predictions, Targets, detections_on_host

ANGLE = "angle"
ROW_OF_CORNERS, ROW_OF_BOX = 9, 5
OUTSIDE = 0.5  # how far outside 0-1 a corner must not lie: boxes that the border cuts have corners outside
LEAST_AREA = 1e-12  # of a box, as a fraction of its image


class ObbTask(DetectTask):
    """Oriented boxes. A label row with a plain box is a box of angle 0: its corners are turned by the augmentation as others are."""

    name = "obb"
    expected_row = "class x1 y1 x2 y2 x3 y3 x4 y4 (four corners), or class cx cy w h (a box of angle 0)"
    coco_type = None
    candidate_field = ANGLE
    submission = "DOTA"
    outputs = (ExportOutput("output0", {0: "batch", 2: "boxes"}, {"boxes": 1e-3, "scores": 1e-4, ANGLE: 1e-4}),)

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of detection, by the overlap of polygons, and two by ProbIoU."""
        return (*METRIC_COLUMNS, *PROBIOU_COLUMNS)

    def parse_row(self, values: Sequence[str]) -> LabelRow | InvalidRow:
        """Class and four corners in any order, or class and box; a corner may lie outside the image by less than half of its side."""
        if len(values) not in (ROW_OF_CORNERS, ROW_OF_BOX):
            return InvalidRow(f"{len(values)} columns, expected: {self.expected_row}", COLUMNS)
        if len(values) == ROW_OF_BOX:
            row = super().parse_row(values)
            return row._replace(polygon=_corners_of_box(row.box_cxcywh)) if isinstance(row, LabelRow) else row
        numbers = parse_numbers(values, self.expected_row, outside=OUTSIDE)
        if isinstance(numbers, InvalidRow):
            return numbers
        corners = ordered_corners(numbers[1:].reshape(-1, 2))
        after = np.roll(corners, -1, axis=0)
        area = abs((corners[:, 0] * after[:, 1] - corners[:, 1] * after[:, 0]).sum()) / 2
        low, high = corners.min(0).clip(0, 1), corners.max(0).clip(0, 1)
        if area < LEAST_AREA or not (high > low).all():
            return InvalidRow("four corners without area inside the image, dropped", NO_AREA, False)
        if not ((corners.mean(0) >= 0) & (corners.mean(0) <= 1)).all():
            return InvalidRow("four corners about a point outside the image, values normalised to 0-1 are expected", OUT_OF_RANGE)
        return LabelRow(int(numbers[0]), np.concatenate(((low + high) / 2, high - low)), corners)

    def targets(self, instances: Instances, hw: tuple[int, int]) -> Mapping[str, NDArray]:
        """Classes (n,), boxes (n, 4) cxcywh in 0-1 before they are turned, and angles (n,): the smallest rectangles about what the image
        shows of the polygons; a box without a polygon has the angle 0."""
        h, w = hw
        boxes = _rectangles_of(instances, hw)
        normalised = (boxes[:, :4] / np.array((w, h, w, h))).astype(np.float32)
        return {"classes": instances.classes, "boxes": normalised, ANGLE: boxes[:, 4].astype(np.float32)}

    def ground_truth(self, batch: Batch) -> GroundTruth:
        """The boxes of a batch in px of the original images, before they are turned, with the field ``angle`` (M, 1): whole, from their
        corners, where the loader kept those, else from targets, which end at the border of the batch's images."""
        if batch.truth is not None:
            return batch.truth
        targets, hw = batch.targets.cpu(), batch.images.shape[-2:]
        boxes = _boxes_of(targets, (float(hw[0]), float(hw[1]))).double()
        xyxy, angle = unrotated(_to_original(boxes, batch.letterbox, image=targets.image))
        truth = GroundTruth.of_boxes(targets.image, targets.classes, xyxy_to_ltwh(xyxy))
        return truth.replace(fields={ANGLE: angle})

    def exact_truth(self, images: Sequence[tuple[Instances, tuple[int, int]]]) -> GroundTruth:
        """The boxes of images in px of the originals, whole where they reach over the border, as detections do."""
        found = [unrotated(torch.from_numpy(_rectangles_of(instances))) for instances, _ in images]
        truth = self.truth_of_originals([i for i, _ in images], [boxes.numpy() for boxes, _ in found])
        return truth.replace(fields={ANGLE: torch.cat([torch.zeros(0, 1), *(angle for _, angle in found)])})

    def postprocess(self, predictions: Predictions, suppression: Suppression) -> list[Detections]:
        return rotated_suppression(predictions, suppression)

    def to_original(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        """Not clipped: a rotated box that reaches over the border keeps its shape."""
        return map_detections(detections_on_host(detections), partial(_moved, move=partial(_to_original, letterbox=letterbox)))

    def to_batch(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        return map_detections(detections, partial(_moved, move=partial(_to_batch, letterbox=letterbox)))

    def shapes(self, detections: Detections) -> Shapes:
        boxes = rotated_boxes(detections.boxes, detections.fields[ANGLE])
        return Shapes(
            extents(boxes), rotated_area(boxes), lambda one, other: rotated_intersection(boxes[one], boxes[other]), can_grow=False
        )  # fmt: skip

    def json_entries(self, detections: Detections) -> list[dict[str, Any]]:
        """The box about it, its four corners (``poly``), and centre, width, height and angle in radians (``rbox``)."""
        boxes = rotated_boxes(detections.boxes, detections.fields[ANGLE]).double()
        plain, corners = super().json_entries(detections), corners_of(boxes).flatten(1)
        return [
            {**entry, "poly": rounded(poly), "rbox": rounded(box, 5)} for entry, poly, box in zip(plain, corners.tolist(), boxes.tolist())
        ]

    def metric(self, names: Sequence[str], *, rule: str = "coco") -> RotatedAccumulator:
        return RotatedAccumulator(names, rule=rule)

    def add_truth(self, detections: Detections, truth: GroundTruth, *, image: int) -> Detections:
        rows = truth.image == image
        classes, boxes = truth.classes[rows], ltwh_to_xyxy(truth.boxes_ltwh[rows]).to(detections.boxes)
        angle = truth.fields[ANGLE][rows].to(detections.boxes)
        overlap = rotated_iou_matrix(rotated_boxes(detections.boxes, detections.fields[ANGLE]), rotated_boxes(boxes, angle))
        same = (overlap > SAME_OBJECT_IOU) & (detections.classes[:, None] == classes)  # (n, m)
        objects = Detections(boxes, torch.ones(len(classes)).to(detections.scores), classes, {ANGLE: angle})
        return Detections.cat([objects, detections[~same.any(dim=1)]])

    def write_submission(self, metric: MetricAccumulator, folder: Path, *, stems: Mapping[str, str]) -> str:
        """``Task1_<class>.txt`` for each class, with a row ``image score x1 y1 … y4`` in px for each detection."""
        from utils.visual.savers import as_file_name

        state = metric.state()
        found, images = state["detections"], [stems.get(str(name), str(name)) for name in state["images"]]
        if len(set(images)) < len(images):
            twice = next(name for i, name in enumerate(images) if name in images[:i])
            raise UserError(f"--save-json: two images are called {twice!r}; DOTA's files tell images apart by their names alone")
        boxes = torch.from_numpy(np.concatenate((found[:, 2:6], state["fields"]["detections"][ANGLE]), axis=1))
        corners = corners_of(rotated_boxes(ltwh_to_xyxy(boxes[:, :4]), boxes[:, 4:])).flatten(1).tolist()
        rows: list[list[str]] = [[] for _ in metric.names]
        for (image, label, score), values in zip(found[:, [0, 1, 6]].tolist(), corners):
            rows[int(label)].append(f"{images[int(image)]} {score:.5g} {' '.join(f'{value:.2f}' for value in values)}\n")
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in zip(metric.names, rows):
            (folder / f"Task1_{as_file_name(name)}.txt").write_text("".join(lines), encoding="utf-8")
        return f"{len(found)} detections in {folder}/Task1_*.txt, for DOTA's evaluation server"

    def detections_of_targets(self, targets: Targets, hw: tuple[int, int], *, count: int) -> list[Detections]:
        boxes, angle = unrotated(_boxes_of(targets, (float(hw[0]), float(hw[1]))))
        together = Detections(boxes, torch.ones(len(targets)), targets.classes, {ANGLE: angle})
        return [together[targets.image == image] for image in range(count)]

    def draw(self, image_rgb: NDArray[np.uint8], detections: Detections, names: Sequence[str], style: DrawStyle) -> NDArray[np.uint8]:
        from utils.visual.draw_rotated import draw_rotated_detections

        return draw_rotated_detections(
            image_rgb, detections, names, line_thickness=style.line_thickness, hide_labels=style.hide_labels, hide_conf=style.hide_conf
        )

    def label_rows(self, detections: Detections, hw: tuple[int, int], *, with_confidence: bool = False) -> list[str]:
        """``class x1 y1 x2 y2 x3 y3 x4 y4`` as fractions of the image, and the score if asked for; corners may lie outside."""
        corners = corners_of(rotated_boxes(detections.boxes, detections.fields[ANGLE])) / detections.boxes.new_tensor((hw[1], hw[0]))
        rows = []
        for values, score, label in zip(corners.flatten(1).tolist(), detections.scores.tolist(), detections.classes.tolist()):
            numbers = (*values, score) if with_confidence else values
            rows.append(" ".join([str(label), *(f"{value:.6g}" for value in numbers)]))
        return rows

    def to_export(self, predictions: Predictions) -> tuple[Tensor, ...]:
        """(B, 4 + nc + 1, N): centre, width and height in px, scores, the angle in radians."""
        parts = (xyxy_to_cxcywh(predictions.boxes), predictions.scores, predictions.fields[ANGLE])
        return (torch.cat(parts, dim=2).transpose(1, 2),)

    def from_export(self, tensors: Sequence[Tensor], *, nc: int) -> Predictions:
        if len(tensors) != 1 or tensors[0].ndim != 3 or tensors[0].shape[1] != 4 + nc + 1:
            raise ValueError(f"one output (batch, {4 + nc + 1}, boxes) is needed for {nc} classes and an angle")
        boxes_cxcywh, scores, angle = tensors[0].float().transpose(1, 2).split((4, nc, 1), dim=2)
        return Predictions(cxcywh_to_xyxy(boxes_cxcywh), scores, {ANGLE: angle})

    def to_rows(self, boxes_xyxy: Tensor, scores: Tensor, classes: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """(B, K, 7): centre, width and height in px, score, class, angle, as others have it."""
        return torch.cat((xyxy_to_cxcywh(boxes_xyxy), scores, classes, fields[ANGLE]), dim=2)

    def from_rows(self, rows: Tensor, *, nc: int) -> Predictions:
        boxes, scores, angle = parts_of_rows(rows, nc=nc, further=1)
        return Predictions(cxcywh_to_xyxy(boxes), scores, {ANGLE: angle}, unique=True)

    def class_count(self, output_shapes: Sequence[Sequence[int | None]]) -> int:
        return max(super().class_count(output_shapes) - 1, 0)


def _corners_of_box(box_cxcywh: np.ndarray) -> np.ndarray:
    """(4, 2)"""
    centre, half = box_cxcywh[:2], box_cxcywh[2:] / 2
    return centre + half * np.array(((-1, -1), (1, -1), (1, 1), (-1, 1)))


def _rectangles_of(instances: Instances, hw: tuple[int, int] | None = None) -> NDArray:
    """(n, 5) centre and size in px, angle: the smallest rectangles about polygons, or about what an image of ``hw`` px shows of them."""
    plain = instances.boxes_xyxy
    boxes = np.concatenate(((plain[:, :2] + plain[:, 2:]) / 2, plain[:, 2:] - plain[:, :2], np.zeros((len(plain), 1))), axis=1)
    has_polygon = instances.counts > 0
    if has_polygon.any():
        boxes[has_polygon] = rectangles_of_polygons(instances.points, instances.counts[has_polygon], hw)
    return boxes


def _boxes_of(targets: Targets, hw: tuple[float, float]) -> Tensor:
    """(M, 5) centre and size in px, angle."""
    if targets.angle is None:
        raise TypeError("targets of oriented boxes have an angle; these come from another task's labels")
    return torch.cat((denormalised(targets.boxes, hw), targets.angle[:, None]), dim=1)


def _moved(detections: Detections, *, move: partial[Tensor], image: Tensor) -> Detections:
    """Detections with their boxes and angles moved."""
    boxes, angle = unrotated(move(rotated_boxes(detections.boxes, detections.fields[ANGLE]), image=image))
    return detections.replace(boxes=boxes, fields={**detections.fields, ANGLE: angle})


def _to_original(boxes_cxcywha: Tensor, letterbox: Letterbox, *, image: Tensor) -> Tensor:
    """Boxes (n, 5) in px of the batch in px of the original images, each on the image that ``image`` (n,) says."""
    scale, pad = (t.to(boxes_cxcywha)[image] for t in (letterbox.scale_xy, letterbox.pad_xy))
    return rescaled(boxes_cxcywha, 1 / scale, -pad / scale)


def _to_batch(boxes_cxcywha: Tensor, letterbox: Letterbox, *, image: Tensor) -> Tensor:
    """The way there."""
    scale, pad = (t.to(boxes_cxcywha)[image] for t in (letterbox.scale_xy, letterbox.pad_xy))
    return rescaled(boxes_cxcywha, scale, pad)


OBB = register_task(ObbTask())
