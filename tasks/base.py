"""The contract of a task: what a label row, a target, a metric, a drawing, a label file and an exported output of it are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.rows import InvalidRow, LabelRow
from utils.boxes import box_area, xyxy_to_ltwh
from utils.errors import UserError, nearest
from utils.instances import Instances
from utils.nms import Suppression
from utils.types import Batch, Detections, Letterbox, Predictions, Targets

ResultField = Callable[[Detections, tuple[int, int]], Any]  # of one image and its height and width in px


@dataclass(frozen=True)
class DrawStyle:
    """How detections are drawn."""

    line_thickness: int | None = None  # px; by the image's size if None
    hide_labels: bool = False
    hide_conf: bool = False


@dataclass(frozen=True)
class TaskDefaults:
    """What the programs take for this task where a flag or the data set's file says nothing.

    Attributes:
        imgsz: side of the network's input, px.
        conf: lowest score of a detection in detect.py and torch.hub's model.
        val_conf: lowest score in a validation.
        hyp: file of hyper-parameters; empty: the recipe of the model's family.
        metric: column of results.csv that a study compares.
    """

    imgsz: int = 640
    conf: float = 0.25
    val_conf: float = 0.001
    hyp: str = ""
    metric: str = "metrics/mAP_0.5:0.95"

    def input_hw(self, imgsz: Sequence[int] | None) -> tuple[int, int]:
        """Height and width in px of the network's input, as ``--imgsz`` gives them, or the usual ones."""
        height, width = imgsz or (self.imgsz, self.imgsz)
        return height, width

    def lowest_score(self, conf_thres: float | None) -> float:
        """That of a detection, as ``--conf-thres`` gives it, or the usual one."""
        return self.conf if conf_thres is None else conf_thres


@dataclass(frozen=True)
class ExportOutput:
    """One output of an exported file.

    Attributes:
        name: of the graph's output.
        axes: which axes are symbolic in a file of dynamic size, and their names.
        tolerance: largest difference from torch, by part of the output (such as ``boxes`` in px and ``scores``).
    """

    name: str
    axes: Mapping[int, str]
    tolerance: Mapping[str, float]


@dataclass(frozen=True)
class View:
    """A version of images that a network has seen in their place (test-time augmentation).

    Attributes:
        hw: height and width of the images in px.
        scale_xy: px of the version for each px of the image.
        mirrored: whether left and right are exchanged.
    """

    hw: tuple[int, int]
    scale_xy: tuple[float, float]
    mirrored: bool = False

    def boxes_back(self, boxes_xyxy: Tensor) -> Tensor:
        """Boxes (..., 4) in px of the version in px of the images."""
        boxes = boxes_xyxy / boxes_xyxy.new_tensor(self.scale_xy).repeat(2)
        if not self.mirrored:
            return boxes
        x1, y1, x2, y2 = boxes.unbind(dim=-1)
        return torch.stack((self.hw[1] - x2, y1, self.hw[1] - x1, y2), dim=-1)


class CommonTask:
    """What most tasks do alike; a task inherits it and overrides what it knows better."""

    name: str
    coco_type: str | None = None
    whole_image = False
    submission = ""
    result_fields: Mapping[str, ResultField] = {}
    candidate_field = ""
    shared_fields: tuple[str, ...] = ()
    settings: Mapping[str, Any] = {}

    def from_settings(self, settings: Mapping[str, Any], *, source: str) -> Any:
        return self

    def for_labels(self, settings: Mapping[str, Any], *, source: str) -> Any:
        return self

    def configured(self, hyp: Any) -> Any:
        return self

    def write_submission(self, metric: Any, folder: Path, *, stems: Mapping[str, str]) -> str:
        raise UserError(f"results of the task {self.name!r} have no form but COCO's")

    def exact_truth(self, images: Sequence[tuple[Instances, tuple[int, int]]]) -> Any:
        return None

    def join(self, parts: Sequence[Predictions]) -> Predictions:
        return Predictions.join_candidates(parts)

    def from_view(self, predictions: Predictions, view: View) -> Predictions:
        """Turns boxes back. Raises UserError where there is more than boxes."""
        if extra := [*predictions.fields, *predictions.shared]:
            also = f"results of the task {self.name!r} also have {', '.join(extra)}"
            raise UserError(f"--augment: turns boxes back only, and {also}; leave it out")
        return Predictions(view.boxes_back(predictions.boxes), predictions.scores)

    def unite(self, detections: Detections, owner: Tensor, pieces: Tensor) -> Detections:
        return detections

    def compact(self, detections: Detections) -> Detections:
        return detections

    def expanded(self, detections: Detections) -> Detections:
        return detections

    def to_original_compact(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        return self.to_original(detections, letterbox)  # type: ignore[attr-defined, no-any-return]

    def shapes(self, detections: Detections) -> Shapes:
        return Shapes.of_boxes(detections.boxes)

    def json_entries(self, detections: Detections) -> list[dict[str, Any]]:
        boxes = xyxy_to_ltwh(self.shapes(detections).extents.double())
        return [{"bbox": rounded(box)} for box in boxes.tolist()]

    def to_rows(self, boxes_xyxy: Tensor, scores: Tensor, classes: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        added = [fields[self.candidate_field]] if self.candidate_field else []
        return torch.cat((boxes_xyxy, scores, classes, *added), dim=2)

    def from_rows(self, rows: Tensor, *, nc: int) -> Predictions:
        further = max(rows.shape[-1] - 6, 1) if self.candidate_field else 0
        boxes, scores, added = parts_of_rows(rows, nc=nc, further=further)
        return Predictions(boxes, scores, {self.candidate_field: added} if self.candidate_field else {}, unique=True)


@dataclass(frozen=True)
class Shapes:
    """The areas of the image that detections of one image cover, as what several windows have found is merged.

    Attributes:
        extents: (n, 4) xyxy px, the axis-aligned boxes about them.
        area: (n,) px².
        common: common area (p,) in px² of pairs, given the first and the second of each.
        can_grow: whether the pieces of an object that windows have cut can be joined, as boxes can; else the best piece stays.
    """

    extents: Tensor
    area: Tensor
    common: Callable[[Tensor, Tensor], Tensor]
    can_grow: bool = True

    @staticmethod
    def of_boxes(boxes_xyxy: Tensor) -> Shapes:
        """Those of axis-aligned boxes (n, 4)."""

        def common(one: Tensor, other: Tensor) -> Tensor:
            low = torch.maximum(boxes_xyxy[one, :2], boxes_xyxy[other, :2])
            return box_area(torch.cat((low, torch.minimum(boxes_xyxy[one, 2:], boxes_xyxy[other, 2:])), dim=1))

        return Shapes(boxes_xyxy, box_area(boxes_xyxy), common)


class MetricResult(Protocol):
    """What a metric computes to: a dataclass, since evaluation fills in ``losses`` and ``speed_ms`` with ``dataclasses.replace``."""

    @property
    def losses(self) -> Mapping[str, float]:
        """Mean validation loss by part, if measured."""

    @property
    def speed_ms(self) -> Mapping[str, float]:
        """Milliseconds per image and stage."""

    @property
    def fitness(self) -> float:
        """What best.pt is chosen by; larger is better."""

    @property
    def columns(self) -> Mapping[str, float]:
        """Values under the names of ``Task.columns``, as results.csv has them."""

    @property
    def headline(self) -> tuple[str, float]:
        """Name and value, in 0-1, of the number by which models are compared."""

    @property
    def class_ap(self) -> Sequence[float]:
        """(nc,) quality of each class in 0-1, NaN for a class without objects; ``--image-weights`` samples by it."""

    @property
    def remarks(self) -> Sequence[str]:
        """Lines for the console below the table."""

    def table(self, *, per_class: bool = True) -> str:
        """A text table for the console."""


class Metric(Protocol):
    """Collects detections and ground truth over a data set and over ranks."""

    @property
    def names(self) -> tuple[str, ...]:
        """Class names."""

    @property
    def coco_kinds(self) -> Mapping[str, Mapping[str, Any]]:
        """What pycocotools can measure of it (``bbox``, ``segm``, ``keypoints``), and with which options; empty for nothing."""

    def update(self, detections: Sequence[Detections], truth: Any, *, images: Sequence[int | str]) -> None:
        """Adds a batch; ``images`` names each image uniquely in the data set."""

    def state(self) -> dict[str, Any]:
        """What another rank sends to be merged."""

    def merge(self, state: Mapping[str, Any]) -> None:
        """Adds another rank's state; images that are known already are left out."""

    def compute(self) -> Any:
        """A :class:`MetricResult` over everything that was added."""


@runtime_checkable
class Task(Protocol):
    """The one place that knows what a kind of result is. A task knows neither networks nor the input pipeline.

    Attributes:
        name: as users write it: detect, segment, pose, obb, classify.
        expected_row: how a row of a label file looks, for messages.
        columns: names of the metric's values in results.csv, in order.
        coco_type: what pycocotools calls it (``bbox``, ``segm``, ``keypoints``); None where a COCO file cannot be its ground truth.
        outputs: the outputs of an exported file.
        candidate_field: name of what its networks predict for each candidate besides box and scores; empty for nothing.
        shared_fields: names of what its networks predict for the whole image besides; outputs of their own in files, behind the first.
        settings: what a file says of its results besides the task's name, such as ``kpt_shape``, as plain values by key.
        defaults: what the programs take where a flag says nothing.
        whole_image: whether a result is one of the whole image. Labels are then the names of folders, images are cropped to a square and
            not letterboxed, and nothing has a place: no mosaic, no rectangular batches, no windows, no anchors.
        result_fields: attributes of ``model(image)``'s results that are no field of detections, by name.
        submission: what the files of results for a benchmark are called where they are not COCO's, such as ``DOTA``; empty for none.
    """

    @property
    def name(self) -> str: ...
    @property
    def expected_row(self) -> str: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def outputs(self) -> tuple[ExportOutput, ...]: ...
    @property
    def coco_type(self) -> str | None: ...
    @property
    def candidate_field(self) -> str: ...
    @property
    def shared_fields(self) -> tuple[str, ...]: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...

    def from_settings(self, settings: Mapping[str, Any], *, source: str) -> Task:
        """This task as a file describes it, which may hold other keys too. Raises UserError, which begins with ``source``."""

    def for_labels(self, settings: Mapping[str, Any], *, source: str) -> Task:
        """This task, whose network is given, with what a data set says of its labels.

        Raises:
            UserError: the data set lacks what the task needs, or does not fit the network; begins with ``source``.
        """

    def configured(self, hyp: Any) -> Task:
        """The task as a recipe has it: itself where no hyper-parameter changes its targets."""

    @property
    def defaults(self) -> TaskDefaults: ...
    @property
    def whole_image(self) -> bool: ...
    @property
    def submission(self) -> str: ...
    @property
    def result_fields(self) -> Mapping[str, ResultField]: ...

    def parse_row(self, values: Sequence[str]) -> LabelRow | InvalidRow:
        """A row of a label file, split at white space; what is wrong with it where it is not this task's."""

    def targets(self, instances: Instances, hw: tuple[int, int]) -> Mapping[str, Any]:
        """The objects of one image of ``hw`` px as arrays (n, ...) by field name of :class:`utils.types.Targets`, without ``image``.

        What is no array follows from ``hw`` alone, so that it holds for a whole batch.
        """

    def ground_truth(self, batch: Batch) -> Any:
        """The objects of a batch, from its targets, in px of the original images: what the metric compares with."""

    def exact_truth(self, images: Sequence[tuple[Instances, tuple[int, int]]]) -> Any:
        """The objects of a batch's originals, each with its height and width in px, for ``ground_truth`` to return; None where the
        targets say all that the metric compares with."""

    def join(self, parts: Sequence[Predictions]) -> Predictions:
        """Candidates of the same images from several networks or views as those of one."""

    def from_view(self, predictions: Predictions, view: View) -> Predictions:
        """Predictions for a resized or mirrored version of the images, in px of the images."""

    def unite(self, detections: Detections, owner: Tensor, pieces: Tensor) -> Detections:
        """Detections of one image, compact or not, in which some become a part of others, apart from their boxes.

        Args:
            owner: (p,) the detection that each piece becomes a part of.
            pieces: (p,) the pieces.
        """

    def postprocess(self, predictions: Predictions, suppression: Suppression) -> list[Detections]:
        """Detections of each image in px of the network's input, best score first."""

    def to_original(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        """Detections of a batch in px of the original images, on the host."""

    def to_original_compact(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        """``compact`` of each of ``to_original``, with what is large, such as masks, of one image at a time."""

    def compact(self, detections: Detections) -> Detections:
        """Detections of one image, on the host, with what is large in its smallest form; they are selected, joined, united and measured
        like others, and ``expanded`` for everything else."""

    def expanded(self, detections: Detections) -> Detections:
        """The inverse of ``compact``; what is no such form stays as it is."""

    def to_batch(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        """The inverse of ``to_original``: detections in px of the original images in px of the batch."""

    def shapes(self, detections: Detections) -> Shapes:
        """What detections of one image, on the host, cover of it."""

    def metric(self, names: Sequence[str], *, rule: str = "coco") -> Metric:
        """An empty metric for these classes."""

    def add_truth(self, detections: Detections, truth: Any, *, image: int) -> Detections:
        """The ground truth of one image of a batch with score 1, then those of its detections that are none of these objects."""

    def write_submission(self, metric: Any, folder: Path, *, stems: Mapping[str, str]) -> str:
        """Writes what a metric has collected as files of results for the benchmark ``submission``; returns a line for the console.

        Args:
            metric: of this task.
            folder: to write into.
            stems: what each image of the metric is called there.
        """

    def plot(self, result: Any, folder: Path) -> None:
        """Writes the figures of a :class:`MetricResult` into a folder."""

    def detections_of_targets(self, targets: Targets, hw: tuple[int, int], *, count: int) -> list[Detections]:
        """The targets of ``count`` images of ``hw`` px as detections of score 1 in px of the batch, to be drawn."""

    def draw(self, image_rgb: NDArray[np.uint8], detections: Detections, names: Sequence[str], style: DrawStyle) -> NDArray[np.uint8]:
        """A copy of an image (H, W, 3) with its detections, which are in its px."""

    def label_rows(self, detections: Detections, hw: tuple[int, int], *, with_confidence: bool = False) -> list[str]:
        """Rows of a label file for an image of ``hw`` px, without line ends; the score last, if asked for."""

    def result_rows(self, detections: Detections, hw: tuple[int, int], *, names: Sequence[str], with_confidence: bool = False) -> list[str]:
        """Rows of the text file that ``--save-txt`` writes: those of a label file, unless others write this task's results otherwise."""

    def json_entries(self, detections: Detections) -> list[dict[str, Any]]:
        """What a JSON file says of each detection of one image, on the host, besides class and score, under COCO's keys where it has
        some: ``bbox`` (x, y, w, h in px of the image), ``segmentation``, ``keypoints`` …"""

    def summary(self, detections: Detections, names: Sequence[str]) -> str:
        """What was found on an image in a few words, such as ``4 person, 1 bus``; empty for nothing."""

    def to_export(self, predictions: Predictions) -> tuple[Tensor, ...]:
        """Decoded predictions as the tensors of ``outputs``; must be traceable."""

    def from_export(self, tensors: Sequence[Tensor], *, nc: int) -> Predictions:
        """The inverse of ``to_export``. Raises ValueError where the tensors are not of this task."""

    def to_rows(self, boxes_xyxy: Tensor, scores: Tensor, classes: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Chosen predictions (B, K, 4), (B, K, 1), (B, K, 1) and (B, K, ·) as the rows (B, K, 6 or more) of a file with a one-to-one
        branch: box, score, class, then what the task adds; must be traceable."""

    def from_rows(self, rows: Tensor, *, nc: int) -> Predictions:
        """The inverse of ``to_rows``; scores of other classes are 0. Raises ValueError where the rows are not of this task."""

    def class_count(self, output_shapes: Sequence[Sequence[int | None]]) -> int:
        """Number of classes that the shapes of a foreign file's outputs imply; 0 where they imply none."""


def parts_of_rows(rows: Tensor, *, nc: int, further: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B, K, 6 + further) as boxes (B, K, 4), scores (B, K, nc) and what follows (B, K, further).

    Raises:
        ValueError: another shape.
    """
    if rows.ndim != 3 or rows.shape[2] != 6 + further:
        raise ValueError(f"one output (batch, detections, {6 + further}) is needed")
    boxes, best, classes, more = rows.float().split((4, 1, 1, further), dim=2)
    scores = best.new_zeros(*rows.shape[:2], nc).scatter_(2, classes.long().clamp(0, nc - 1), best)
    return boxes, scores, more


def rounded(values: Sequence[float], digits: int = 3) -> list[float]:
    """Numbers as they stand in a JSON file."""
    return [round(value, digits) for value in values]


TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Makes a task known by its name.

    Raises:
        UserError: another task has this name.
    """
    if TASKS.get(task.name, task) is not task:
        raise UserError(f"task {task.name!r} is registered already")
    TASKS[task.name] = task
    return task


def get_task(name: str) -> Task:
    """A task by its name.

    Raises:
        UserError: no task is called so; names those that are known.
    """
    if name not in TASKS:
        hint = nearest(name, TASKS)
        raise UserError(f"task {name!r} is unknown{', ' + hint if hint else ''} (known are {', '.join(sorted(TASKS))})")
    return TASKS[name]


def targets_of_images(parts: Sequence[Mapping[str, Any]]) -> Targets:
    """The targets of a batch from those of its images of one size, in order."""
    counts = torch.tensor([len(part["boxes"]) for part in parts])
    arrays = [name for name, value in parts[0].items() if isinstance(value, np.ndarray)]
    joined = {**parts[0], **{name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in arrays}}
    joined["classes"] = joined["classes"].long()
    return Targets(image=torch.arange(len(parts)).repeat_interleave(counts), **joined)
