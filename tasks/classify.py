"""Classification: one class for the whole image, with the scores of the best few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.base import CommonTask, DrawStyle, ExportOutput, ResultField, TaskDefaults, register_task
from tasks.rows import COLUMNS, NO_POLYGON, InvalidRow, LabelRow, parse_numbers
from utils.boxes import to_batch
from utils.instances import Instances
from utils.metrics.top_k import BEST, ClassificationMetrics, ClassTruth, TopKMetric
from utils.nms import Suppression
from utils.types import Batch, Detections, Letterbox, Predictions, Targets, detections_on_host

WHOLE = np.array((0.5, 0.5, 1.0, 1.0))  # cxcywh of an image in its own measure
FEWEST_TO_SUM_UP = 0.01  # score below which a summary leaves a class out


class Probs(NamedTuple):
    """The best classes of an image, up to five."""

    top5: list[int]  # class numbers, best first
    top5conf: Tensor  # (n,) their scores

    @property
    def top1(self) -> int:
        """The best class."""
        return self.top5[0]

    @property
    def top1conf(self) -> Tensor:
        """Its score."""
        return self.top5conf[0]


def probs_of(found: Detections, hw: tuple[int, int]) -> Probs | None:
    """The best classes; None where no score is above the threshold."""
    return Probs(found.classes.tolist(), found.scores) if len(found) else None


class ClassifyTask(CommonTask):
    """One class for each image. Its detections are the best classes, up to five, each with the box of the whole image.

    Scores sum to 1 over all classes, so that the threshold is 0 unless one is given: what is asked for are the best, however low.
    """

    name = "classify"
    expected_row = "class"
    coco_type = None
    defaults = TaskDefaults(imgsz=224, conf=0.0, val_conf=0.0, hyp="hyp.cls.yaml", metric="metrics/accuracy_top1")
    whole_image = True
    result_fields: Mapping[str, ResultField] = MappingProxyType({"probs": probs_of})
    columns = ("metrics/accuracy_top1", "metrics/accuracy_top5")
    outputs = (ExportOutput("output0", {0: "batch"}, {"boxes": 1e-3, "scores": 1e-4}),)

    def parse_row(self, values: Sequence[str]) -> LabelRow | InvalidRow:
        """A class number alone. Class folders need no label files; rows are for tables of images and for messages."""
        if len(values) != 1:
            return InvalidRow(f"{len(values)} columns, expected: {self.expected_row}; classes of images are folders", COLUMNS)
        numbers = parse_numbers(values, self.expected_row)
        return numbers if isinstance(numbers, InvalidRow) else LabelRow(int(numbers[0]), WHOLE, NO_POLYGON)

    def targets(self, instances: Instances, hw: tuple[int, int]) -> Mapping[str, NDArray]:
        """Classes (n,), one an image in a set of class folders, and for each the whole image as its box (n, 4) cxcywh."""
        return {"classes": instances.classes, "boxes": np.tile(WHOLE.astype(np.float32), (len(instances), 1))}

    def ground_truth(self, batch: Batch) -> ClassTruth:
        """The classes of a batch, and the size of their images in px of the originals."""
        targets = batch.targets.cpu()
        return ClassTruth(targets.image, targets.classes, _whole(batch.letterbox.original_hw[targets.image]))

    def postprocess(self, predictions: Predictions, suppression: Suppression) -> list[Detections]:
        """The best classes of each image, up to five, above ``suppression.conf`` and among ``suppression.classes``.

        Of several candidates of an image (an ensemble, test-time augmentation) the scores are averaged.
        """
        count = len(predictions.scores)
        scores = predictions.scores.mean(dim=1) if predictions.scores.shape[1] else predictions.scores.new_zeros(count, 0)  # (B, nc)
        if suppression.classes is not None:
            kept = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
            kept[torch.tensor(suppression.classes, dtype=torch.long, device=scores.device)] = True
            scores = scores * kept
        best, classes = scores.topk(min(BEST, suppression.max_det, scores.shape[1]), dim=1)  # (B, k)
        counts = (best > suppression.conf).sum(dim=1).tolist()
        boxes = predictions.boxes[:, :1] if predictions.boxes.shape[1] else predictions.boxes.new_zeros(count, 1, 4)
        return [Detections(boxes[i].expand(n, 4), best[i, :n], classes[i, :n]) for i, n in enumerate(counts)]

    def to_original(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        """Each with the box of the whole original, whatever part of it the network saw."""
        whole = _whole(letterbox.original_hw.cpu())
        return [d.replace(boxes=whole[i : i + 1].expand(len(d), 4)) for i, d in enumerate(detections_on_host(detections))]

    def to_batch(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        """The whole original in px of the batch; it may reach over the border."""
        return [
            d.replace(boxes=to_batch(d.boxes, letterbox, image=torch.full((len(d),), i, dtype=torch.long)))
            for i, d in enumerate(detections)
        ]

    def metric(self, names: Sequence[str], *, rule: str = "coco") -> TopKMetric:
        """The share of images whose class is the best, and among the best five; there is one rule for it."""
        return TopKMetric(names)

    def add_truth(self, detections: Detections, truth: ClassTruth, *, image: int) -> Detections:
        rows = truth.image == image
        classes, boxes = truth.classes[rows], truth.boxes[rows].to(detections.boxes)
        others = ~(detections.classes[:, None] == classes).any(dim=1)
        return Detections.cat([Detections(boxes, torch.ones(len(classes)).to(detections.scores), classes), detections[others]])

    def plot(self, result: ClassificationMetrics, folder: Path) -> None:
        """The confusion matrix, and the accuracy of each class."""
        from utils.visual.plots import plot_class_accuracy, plot_confusion

        plot_confusion(result.confusion, result.names, folder / "confusion_matrix.png")
        plot_class_accuracy(result, folder / "class_accuracy.png")

    def detections_of_targets(self, targets: Targets, hw: tuple[int, int], *, count: int) -> list[Detections]:
        boxes = _whole(torch.tensor([hw])).expand(len(targets), 4)
        together = Detections(boxes, torch.ones(len(targets)), targets.classes)
        return [together[targets.image == image] for image in range(count)]

    def draw(self, image_rgb: NDArray[np.uint8], detections: Detections, names: Sequence[str], style: DrawStyle) -> NDArray[np.uint8]:
        """The classes in the image's corner, best first, each with a bar as long as its score."""
        from utils.visual.class_strip import draw_class_strip

        return draw_class_strip(
            image_rgb, detections, names, line_thickness=style.line_thickness, hide_labels=style.hide_labels, hide_conf=style.hide_conf
        )

    def label_rows(self, detections: Detections, hw: tuple[int, int], *, with_confidence: bool = False) -> list[str]:
        """The class number, and the score if asked for."""
        rows = zip(detections.classes.tolist(), detections.scores.tolist())
        return [f"{label} {score:.6g}" if with_confidence else str(label) for label, score in rows]

    def result_rows(self, detections: Detections, hw: tuple[int, int], *, names: Sequence[str], with_confidence: bool = False) -> list[str]:
        """``score name``, best first, as classifiers of YOLO projects write it; the score is always there."""
        return [f"{score:.2f} {names[label]}" for label, score in zip(detections.classes.tolist(), detections.scores.tolist())]

    def json_entries(self, detections: Detections) -> list[dict[str, Any]]:
        """Nothing: class and score are all there is."""
        return [{} for _ in range(len(detections))]

    def summary(self, detections: Detections, names: Sequence[str]) -> str:
        """Such as ``cat 0.92, dog 0.05``."""
        pairs = [*zip(detections.classes.tolist(), detections.scores.tolist())]
        shown = [p for p in pairs if p[1] >= FEWEST_TO_SUM_UP] or pairs[:1]
        return ", ".join(f"{names[label]} {score:.2f}" for label, score in shown)

    def to_export(self, predictions: Predictions) -> tuple[Tensor, ...]:
        """(B, nc): the scores."""
        return (predictions.scores[:, 0],)

    def from_export(self, tensors: Sequence[Tensor], *, nc: int) -> Predictions:
        """One candidate an image; its box is empty, as the file does not say how large the image was."""
        if len(tensors) != 1 or tensors[0].ndim != 2 or tensors[0].shape[1] != nc:
            raise ValueError(f"one output (batch, {nc}) is needed for {nc} classes")
        scores = tensors[0].float()[:, None]  # (B, 1, nc)
        return Predictions(scores.new_zeros(len(scores), 1, 4), scores)

    def class_count(self, output_shapes: Sequence[Sequence[int | None]]) -> int:
        return (output_shapes[0][1] or 0) if len(output_shapes) == 1 and len(output_shapes[0]) == 2 else 0


def _whole(hw: Tensor) -> Tensor:
    """(n, 2) heights and widths as boxes (n, 4) xyxy of whole images."""
    wh = hw.float().flip(-1)
    return torch.cat((torch.zeros_like(wh), wh), dim=-1)


CLASSIFY = register_task(ClassifyTask())
