"""Callbacks of an evaluation: example images and label files. They see every batch and change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from engine.logging.observing import observing
from tasks import Task
from utils import distributed
from utils.types import Batch, Detections
from utils.visual.savers import ResultWriter, SaveOptions, unique_stems

EXAMPLES = 3  # batches
SHOWN_CONFIDENCE = 0.25  # detections above this are drawn


class EvaluatedBatch(NamedTuple):
    """A batch and what was found on it."""

    number: int  # from 0
    batch: Batch
    task: Task
    found: list[Detections]  # px of the original images, on the CPU, in the task's compact form
    truth: Any  # as the task's metric compares with

    @property
    def detections(self) -> Iterator[Detections]:
        """What was found on each image in px of the original, one image after another: masks of a whole batch may be large."""
        return map(self.task.expanded, self.found)

    @property
    def detections_in_batch(self) -> Iterator[Detections]:
        """The same in px of the batch's images."""
        for image, detections in enumerate(self.detections):
            yield from self.task.to_batch([detections], self.batch.letterbox.select(slice(image, image + 1)))


class EvaluationCallback(Protocol):
    """Sees every batch of an evaluation and changes nothing."""

    def on_batch(self, evaluated: EvaluatedBatch) -> None:
        """After each batch, on the main rank; where it has a true attribute ``everywhere``, on every rank."""


class ImageSaver:
    """``val_batch{0,1,2}_labels.jpg`` and ``…_pred.jpg`` in a folder."""

    def __init__(self, folder: Path, names: Sequence[str], task: Task) -> None:
        self.folder, self.names, self.task = folder, names, task

    def on_batch(self, evaluated: EvaluatedBatch) -> None:
        if evaluated.number >= EXAMPLES:
            return
        from engine.logging.batch_images import save_batch_image

        batch, stem = evaluated.batch, f"val_batch{evaluated.number}"
        with observing(f"drawing {stem}"):
            confident = [d[d.scores > SHOWN_CONFIDENCE] for d in evaluated.detections_in_batch]
            save_batch_image(self.folder / f"{stem}_labels.jpg", batch, self.task, self.names)
            save_batch_image(self.folder / f"{stem}_pred.jpg", batch, self.task, self.names, detections=confident)


class TextSaver:
    """A label file for every image with detections; the main rank writes those of all.

    Args:
        folder: Run folder; the files go into its ``labels``.
        with_confidence: Whether rows end in the score.
        with_truth: Whether the objects themselves are written too, with score 1, and detections of the same objects are left out.
        image_files: Of the split: images of one name are told apart by their folders.
    """

    everywhere = True

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        with_confidence: bool = False,
        with_truth: bool = False,
        image_files: Sequence[str] = (),
    ) -> None:
        self.folder, self.names, self.stems = folder, names, unique_stems(image_files)
        self.with_truth, self.with_confidence = with_truth, with_confidence
        self.writer: ResultWriter | None = None

    def on_batch(self, evaluated: EvaluatedBatch) -> None:
        if self.writer is None:
            options = SaveOptions(images=False, txt=True, conf=self.with_confidence)
            self.writer = ResultWriter(self.folder, self.names, options, evaluated.task, stems=self.stems)
        task, found = evaluated.task, evaluated.found
        if self.with_truth:
            found = [task.compact(task.add_truth(d, evaluated.truth, image=i)) for i, d in enumerate(evaluated.detections)]
        rows = list(zip(evaluated.batch.paths, evaluated.batch.letterbox.original_hw.tolist(), found))
        shares = distributed.gather_objects(rows if evaluated.batch.images_of_step else [])
        for path, (height, width), of_image in (row for share in shares for row in share) if distributed.is_main() else ():
            blank = np.broadcast_to(np.uint8(0), (height, width, 3))  # only its shape is used
            self.writer.write(path, blank, task.expanded(of_image), drawn=blank)
