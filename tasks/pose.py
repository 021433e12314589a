"""Pose estimation: an axis-aligned box, a class and a score as in detection, and the object's keypoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.base import DrawStyle, ExportOutput, TaskDefaults, register_task, rounded
from tasks.detect import DetectTask, map_detections
from tasks.keypoints import Keypoints, read_keypoints
from tasks.rows import COLUMNS, NO_POLYGON, OUT_OF_RANGE, ROUNDING, InvalidRow, LabelRow, parse_numbers
from utils.boxes import xyxy_to_cxcywh
from utils.errors import UserError
from utils.instances import Instances
from utils.metrics.keypoints import MARK, PoseAccumulator
from utils.metrics.metrics import GroundTruth
from utils.metrics.oks import BOX_TO_AREA
from utils.metrics.paired import paired_columns
from utils.nms import Suppression
from utils.types import Batch, Detections, Letterbox, Predictions, Targets

BOX_COLUMNS = 5
HIDDEN = 0.5  # confidence of a keypoint below which a label row calls it unlabelled


class PoseTask(DetectTask):
    """Boxes with keypoints.

    A row is ``class cx cy w h`` and for each keypoint ``x y visibility``, or ``x y`` where the data set has no visibility; a row of a box
    alone is an object without labelled keypoints. Detections hold (n, K, 3): x and y in px, and a confidence in 0-1.

    Attributes:
        keypoints: what they are; None takes any number of ``x y visibility``, as read without a data set or a model at hand.
    """

    name = "pose"
    coco_type = "keypoints"
    candidate_field = "keypoints"
    defaults = TaskDefaults(metric=f"metrics/mAP_0.5:0.95({MARK})")
    outputs = (ExportOutput("output0", {0: "batch", 2: "boxes"}, {"boxes": 1e-3, "scores": 1e-4}),)

    def __init__(self, keypoints: Keypoints | None = None) -> None:
        self.keypoints = keypoints
        self.settings = keypoints.settings if keypoints else {}
        times = f"{keypoints.count} times" if keypoints else "then for each keypoint"
        self.expected_row = f"class cx cy w h, {times} x y{' visibility' * (keypoints is None or keypoints.values == 3)}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of detection for the boxes and for the keypoints."""
        return paired_columns(MARK)

    def from_settings(self, settings: Mapping[str, Any], *, source: str) -> PoseTask:
        """The task with the keypoints that a file records."""
        return PoseTask(read_keypoints(settings, source=source))

    def for_labels(self, settings: Mapping[str, Any], *, source: str) -> PoseTask:
        """The task with the keypoints of a data set: their σ and skeleton are the data set's.

        Raises:
            UserError: the data set has no keypoints, or others than the network.
        """
        found = read_keypoints(settings, source=source)
        if found is None:
            example = list(self.keypoints.shape) if self.keypoints else [17, 3]
            raise UserError(f"{source}: no kpt_shape, which pose estimation needs: write kpt_shape: {example}, or take a detection model")
        if self.keypoints is not None and self.keypoints.shape != found.shape:
            ours, theirs = list(self.keypoints.shape), list(found.shape)
            raise UserError(f"{source}: kpt_shape: {theirs}, but the network predicts keypoints of {ours}; give the data set of its own")
        return PoseTask(found)

    def parse_row(self, values: Sequence[str]) -> LabelRow | InvalidRow:
        """Class, box and keypoints; coordinates just outside 0-1 are clipped, those of unlabelled keypoints may be anything."""
        count = len(values) - BOX_COLUMNS
        known = self.keypoints
        each = known.values if known else 3
        fits = count == known.count * each if known else count % each == 0
        if count < 0 or not (fits or count == 0):
            total = f"{BOX_COLUMNS + known.count * each} by kpt_shape {list(known.shape)}: " if known else ""
            return InvalidRow(f"{len(values)} columns, expected {total}{self.expected_row}; or 5 columns, a box alone", COLUMNS)
        box = super().parse_row(values[:BOX_COLUMNS])
        if isinstance(box, InvalidRow):
            return box
        if count == 0:
            return box._replace(keypoints=np.zeros((known.count if known else 0, 3)))
        keypoints = _parse_keypoints(values[BOX_COLUMNS:], each, expected=self.expected_row)
        return keypoints if isinstance(keypoints, InvalidRow) else box._replace(polygon=NO_POLYGON, keypoints=keypoints)

    def targets(self, instances: Instances, hw: tuple[int, int]) -> Mapping[str, NDArray]:
        """Classes (n,), boxes (n, 4) cxcywh and keypoints (n, K, 3), coordinates in 0-1; K is 0 where no object has any."""
        keypoints = instances.keypoints
        if keypoints is None:
            keypoints = np.zeros((len(instances), self.keypoints.count if self.keypoints else 0, 3), np.float32)
        scaled = (keypoints / np.array((hw[1], hw[0], 1), np.float32)).astype(np.float32)
        return {**super().targets(instances, hw), "keypoints": scaled}

    def ground_truth(self, batch: Batch) -> GroundTruth:
        """Boxes and keypoints of a batch in px of the original images; the area is that which COCO's sets have for such a box."""
        targets, (h, w) = batch.targets.cpu(), batch.images.shape[-2:]
        assert targets.keypoints is not None
        truth, points = super().ground_truth(batch), targets.keypoints.double()
        xy = _original_points(points[..., :2] * torch.tensor((w, h)), batch.letterbox, targets.image)
        keypoints = torch.cat((xy, points[..., 2:]), dim=-1)
        return truth.replace(area=truth.area * BOX_TO_AREA, fields={"keypoints": keypoints})

    def postprocess(self, predictions: Predictions, suppression: Suppression) -> list[Detections]:
        """Detections whose keypoints are (n, K, 3)."""
        flat = {name: value.flatten(2) for name, value in predictions.fields.items()}
        return [self._as_points(found) for found in super().postprocess(predictions.replace(fields=flat), suppression)]

    def _as_points(self, found: Detections) -> Detections:
        values = found.fields["keypoints"]
        each = self.keypoints.values if self.keypoints else 3
        points = values.unflatten(1, (-1, each))
        if each == 2:  # nothing says how sure the network is
            points = torch.cat((points, points.new_ones(*points.shape[:2], 1)), dim=-1)
        return found.replace(fields={**found.fields, "keypoints": points})

    def to_original(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        """Boxes and keypoints in px of the original images, moved into them."""
        boxes = super().to_original(detections, letterbox)
        return _with_points(boxes, lambda xy, image: _original_points(xy, letterbox, image, clip=True))

    def to_batch(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        boxes = super().to_batch(detections, letterbox)
        return _with_points(boxes, lambda xy, image: xy * letterbox.scale_xy[image][:, None] + letterbox.pad_xy[image][:, None])

    def unite(self, detections: Detections, owner: Tensor, pieces: Tensor) -> Detections:
        """Of each keypoint the one that the network is surest of among an object and its pieces."""
        points = detections.fields["keypoints"]
        sure, index = points[..., 2], owner[:, None].expand(-1, points.shape[1])
        best = sure.scatter_reduce(0, index, sure[pieces], "amax")
        piece, k = ((sure[pieces] == best[owner]) & (sure[pieces] > sure[owner])).nonzero(as_tuple=True)
        united = points.index_put((owner[piece], k), points[pieces[piece], k])
        return detections.replace(fields={**detections.fields, "keypoints": united})

    def metric(self, names: Sequence[str], *, rule: str = "coco") -> PoseAccumulator:
        return PoseAccumulator(names, rule=rule, sigmas=self.keypoints.oks_sigmas if self.keypoints else ())

    def truth_fields(self, truth: GroundTruth, rows: Tensor) -> Mapping[str, Tensor]:
        return {"keypoints": _as_found(truth.fields["keypoints"][rows].float())}

    def plot(self, result: Any, folder: Path) -> None:
        """Precision, recall and F1 curves of boxes and keypoints, and the confusion matrix of the boxes."""
        from utils.visual.plots import plot_curves

        super().plot(result.box, folder)
        (folder / "keypoints").mkdir(exist_ok=True)
        plot_curves(result.own, folder / "keypoints")

    def detections_of_targets(self, targets: Targets, hw: tuple[int, int], *, count: int) -> list[Detections]:
        assert targets.keypoints is not None
        scaled = targets.keypoints * torch.tensor((hw[1], hw[0], 1)).to(targets.keypoints)
        boxes = super().detections_of_targets(targets, hw, count=count)
        return [
            found.replace(fields={"keypoints": _as_found(scaled[targets.image == image])}) for image, found in enumerate(boxes)
        ]  # fmt: skip

    def draw(self, image_rgb: NDArray[np.uint8], detections: Detections, names: Sequence[str], style: DrawStyle) -> NDArray[np.uint8]:
        from utils.visual.skeleton import draw_skeletons

        points = detections.fields["keypoints"].detach().float().cpu().numpy()
        limbs = self.keypoints.limbs if self.keypoints else Keypoints(points.shape[1]).limbs
        below = draw_skeletons(image_rgb.copy(), points[::-1], limbs, line_thickness=style.line_thickness)
        return super().draw(below, detections, names, style)

    def label_rows(self, detections: Detections, hw: tuple[int, int], *, with_confidence: bool = False) -> list[str]:
        """``class cx cy w h``, then ``x y visibility`` (or ``x y``) of each keypoint, in 0-1, and the score if asked for.

        Visibility is 2, or 0 for a keypoint of which the network is not sure.
        """
        points = detections.fields["keypoints"]
        xy = (points[..., :2] / points.new_tensor((hw[1], hw[0]))).clamp(0, 1)
        each = self.keypoints.values if self.keypoints else 3
        seen = torch.where(points[..., 2:] >= HIDDEN, 2.0, 0.0)
        columns = (torch.cat((xy, seen), dim=2) if each == 3 else xy).flatten(1).tolist()
        boxes = super().label_rows(detections, hw)
        rows = [" ".join((box, *(f"{value:.6g}" for value in row))) for box, row in zip(boxes, columns)]
        return [f"{row} {score:.6g}" for row, score in zip(rows, detections.scores.tolist())] if with_confidence else rows

    def json_entries(self, detections: Detections) -> list[dict[str, Any]]:
        """Box, and x, y in px and confidence of each keypoint."""
        points = detections.fields["keypoints"].flatten(1).double().tolist()
        return [{**entry, "keypoints": rounded(row)} for entry, row in zip(super().json_entries(detections), points)]

    def to_export(self, predictions: Predictions) -> tuple[Tensor, ...]:
        """(B, 4 + nc + K · D, N): centre, width and height in px, scores, then x and y in px (and visibility) of each keypoint."""
        parts = (xyxy_to_cxcywh(predictions.boxes), predictions.scores, predictions.fields["keypoints"].flatten(2))
        return (torch.cat(parts, dim=2).transpose(1, 2),)

    def from_export(self, tensors: Sequence[Tensor], *, nc: int) -> Predictions:
        known = self.keypoints
        fits = len(tensors) == 1 and tensors[0].ndim == 3
        values = tensors[0].shape[1] - 4 - nc if fits else 0
        if not fits or values <= 0 or (values != known.count * known.values if known else values % 3):
            wanted = f"{4 + nc + known.count * known.values}" if known else f"{4 + nc} + 3 for each keypoint"
            raise ValueError(f"one output (batch, {wanted}, boxes) is needed for {nc} classes and keypoints")
        boxes, keypoints = tensors[0].split((4 + nc, values), dim=1)
        return super().from_export([boxes], nc=nc).replace(fields={"keypoints": keypoints.float().transpose(1, 2)})

    def class_count(self, output_shapes: Sequence[Sequence[int | None]]) -> int:
        """By the number of keypoints; 0 where that is not known."""
        if self.keypoints is None:
            return 0
        return max(super().class_count(output_shapes) - self.keypoints.count * self.keypoints.values, 0)


def _parse_keypoints(values: Sequence[str], each: int, *, expected: str) -> NDArray | InvalidRow:
    """(K, 3) of x, y and visibility; a keypoint without visibility in its row is visible."""
    numbers = parse_numbers(("0", *values), expected, outside=math.inf)
    if isinstance(numbers, InvalidRow):
        return numbers
    points = numbers[1:].reshape(-1, each)
    visibility = points[:, 2] if each == 3 else np.full(len(points), 2.0)
    wrong = np.flatnonzero(~np.isin(visibility, (0, 1, 2)))
    if len(wrong):
        k = int(wrong[0])
        column = BOX_COLUMNS + k * each + 3
        return InvalidRow(f"visibility {visibility[k]:g} of keypoint {k} in column {column}, 0, 1 or 2 is expected", OUT_OF_RANGE)
    xy, labelled = points[:, :2], visibility > 0
    outside = np.argwhere(((xy < -ROUNDING) | (xy > 1 + ROUNDING)) & labelled[:, None])
    if len(outside):
        k, axis = outside[0].tolist()
        where = f"{'xy'[axis]} {xy[k, axis]:g} of keypoint {k} in column {BOX_COLUMNS + k * each + axis + 1}"
        return InvalidRow(f"{where}, values normalised to 0-1 are expected", OUT_OF_RANGE)
    return np.concatenate((xy.clip(0, 1), visibility[:, None]), axis=1)


def _as_found(keypoints: Tensor) -> Tensor:
    """Labelled keypoints (n, K, 3) as detected ones: confidence 1, or 0 for those that are not labelled."""
    return torch.cat((keypoints[..., :2], (keypoints[..., 2:] > 0).to(keypoints)), dim=-1)


def _original_points(xy: Tensor, letterbox: Letterbox, image: Tensor, *, clip: bool = False) -> Tensor:
    """Points (n, K, 2) px of the batch in px of the original images; ``image`` (n,) says which each row is on."""
    moved = (xy - letterbox.pad_xy[image][:, None]) / letterbox.scale_xy[image][:, None]
    if not clip:
        return moved
    return torch.minimum(moved.clamp(min=0), letterbox.original_hw[image].flip(-1)[:, None].to(moved))


def _with_points(detections: Sequence[Detections], move: Callable[[Tensor, Tensor], Tensor]) -> list[Detections]:
    """Detections of a batch with their keypoints moved; ``move`` takes (n, K, 2) of all, and which image each row is on."""

    def moved(together: Detections, image: Tensor) -> Detections:
        points = together.fields["keypoints"].float()
        points = torch.cat((move(points[..., :2], image), points[..., 2:]), dim=-1)
        return together.replace(fields={**together.fields, "keypoints": points})

    return map_detections(detections, moved)


POSE = register_task(PoseTask())
