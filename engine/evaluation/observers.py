"""Observers of an evaluation: images and label files of what was found. They are told of every batch and change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from utils import distributed
from utils.boxes import box_iou, ltwh_to_xyxy
from utils.metrics.metrics import GroundTruth, Metrics
from utils.types import Batch, Detections
from utils.visual.savers import ResultWriter, SaveOptions

PICTURES = 3  # batches
SHOWN_CONFIDENCE = 0.25  # detections above this are drawn
HYBRID_IOU = 0.7  # a detection that overlaps an object of its class more is that object


class EvaluatedBatch(NamedTuple):
    """A batch and what was found on it."""

    number: int  # from 0
    batch: Batch
    found: list[Detections]  # px of the batch images, on the CPU
    detections: list[Detections]  # px of the original images, on the CPU
    truth: GroundTruth


class EvaluationObserver(Protocol):
    """Sees every batch of an evaluation; what it does with it is its own."""

    def on_batch(self, seen: EvaluatedBatch) -> None:
        """After each batch, on the main process; where it has a true attribute ``everywhere``, on every process."""


class ImageSaver:
    """``val_batch{0,1,2}_labels.jpg`` and ``…_pred.jpg`` in a folder."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    def on_batch(self, seen: EvaluatedBatch) -> None:
        if seen.number >= PICTURES:
            return
        from utils.visual.plots import plot_batch

        images, stem = seen.batch.images.cpu(), f"val_batch{seen.number}"
        sure = [Detections(*(column[d.scores > SHOWN_CONFIDENCE] for column in d)) for d in seen.found]
        plot_batch(images, seen.batch.targets.cpu(), self.names, self.folder / f"{stem}_labels.jpg", paths=seen.batch.paths)
        plot_batch(images, sure, self.names, self.folder / f"{stem}_pred.jpg", paths=seen.batch.paths)


class TextSaver:
    """A label file for every image with detections; the main process writes those of all.

    Args:
        folder: Run folder; the files go into its ``labels``.
        with_confidence: Whether rows have the score as a sixth column.
        with_truth: Whether the objects themselves are written too, with score 1, and detections of the same objects left out.
    """

    everywhere = True

    def __init__(self, folder: Path, names: Sequence[str], *, with_confidence: bool = False, with_truth: bool = False) -> None:
        self.with_truth = with_truth
        self.writer = ResultWriter(folder, names, SaveOptions(images=False, txt=True, conf=with_confidence))

    def on_batch(self, seen: EvaluatedBatch) -> None:
        rows = []
        for i, (path, detections) in enumerate(zip(seen.batch.paths, seen.detections)):
            found = with_objects(detections, seen.truth, image=i) if self.with_truth else detections
            rows.append((path, seen.batch.letterbox.original_hw[i].tolist(), found))
        shares = distributed.gather_objects(rows if seen.batch.images_of_step else [])
        for path, (height, width), found in (row for share in shares for row in share) if distributed.is_main() else ():
            blank = np.broadcast_to(np.uint8(0), (height, width, 3))  # only its shape is asked for
            self.writer.write(path, blank, found, drawn=blank)


def with_objects(detections: Detections, truth: GroundTruth, *, image: int) -> Detections:
    """The objects of one image, with score 1, and those detections that are none of them."""
    rows = truth.image == image
    classes, boxes = truth.classes[rows], ltwh_to_xyxy(truth.boxes_ltwh[rows]).to(detections.boxes)
    same = (box_iou(detections.boxes, boxes) > HYBRID_IOU) & (detections.classes[:, None] == classes)  # (n, m)
    new = ~same.any(dim=1)
    scores = torch.ones(len(classes)).to(detections.scores)
    both = zip((boxes, scores, classes), (column[new] for column in detections))
    return Detections(*(torch.cat(columns) for columns in both))


def save_plots(metrics: Metrics, folder: Path) -> None:
    """Precision, recall and F1 curves and the confusion matrix."""
    from utils.visual.plots import plot_confusion, plot_curves

    plot_curves(metrics, folder)
    plot_confusion(metrics.confusion, metrics.names, folder / "confusion_matrix.png")
