"""Sliced inference: an image goes through the predictor window by window, and what all windows found is merged with what the whole showed.

detect.py calls a ``SlicedPredictor`` for every frame, val.py a ``SlicedEvaluation`` for every batch. Windows are cut from the original
image and letterboxed like an image of their size; memory holds one batch of them, whatever the image's size, and of their detections only
what a task's compact form has: masks as run-length codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.images.reading import ImageError
from engine.inference.predictor import Predictor, collate
from engine.inference.slicing import WindowDetections, merge_windows, slice_windows
from tasks import Task
from utils.errors import UserError
from utils.types import Batch, Detections, Letterbox

if TYPE_CHECKING:
    from data.dataset import ImageDataset

BATCH_OF_WINDOWS = 8  # in detect.py; val.py takes its batch size


@dataclass(frozen=True)
class SlicedPredictor:
    """Finds the objects of an image through windows, too.

    Attributes:
        predictor: Network and suppression.
        size_hw: Height and width of a window in px of the image.
        overlap: Least common part of neighbouring windows, a fraction of their sides.
        input_hw: Height and width that windows are fitted into for the network, px.
        batch: Windows that go through the network at once.
    """

    predictor: Predictor
    size_hw: tuple[int, int]
    overlap: float
    input_hw: tuple[int, int]
    batch: int = BATCH_OF_WINDOWS

    def windows(self, hw: tuple[int, int]) -> Tensor:
        """The windows (n, 4) xyxy px of an image; none where it fits into one, as the whole image is predicted anyway."""
        windows = slice_windows(hw, self.size_hw, self.overlap)
        return windows if len(windows) > 1 else windows[:0]

    def __call__(self, image: np.ndarray, whole: Detections) -> Detections:
        """The objects of an image (H, W, C), integers or floats in 0-1.

        Args:
            image: The original.
            whole: What was found on the whole image, in px of the original, on the CPU.
        """
        return self.predictor.task.expanded(self.compact(image, whole)) if len(self.windows(image.shape[:2])) else whole

    def compact(self, image: np.ndarray, whole: Detections) -> Detections:
        """The same in the task's compact form; ``whole`` may have it, too."""
        hw = (image.shape[0], image.shape[1])
        windows, whole = self.windows(hw), self.predictor.task.compact(whole)
        if not len(windows):
            return whole
        full = torch.tensor([(0, 0, hw[1], hw[0])]).expand(len(whole), -1)
        found = [WindowDetections(whole, full.float(), torch.zeros(len(whole), dtype=torch.long))]
        for part in torch.arange(len(windows)).split(self.batch):
            detections, window = self._predict(image, windows[part])
            found.append(WindowDetections(detections, windows[part][window].float(), 1 + part[window]))
        suppression = self.predictor.suppression
        together = WindowDetections.cat(found)
        return merge_windows(
            together, hw, iou=suppression.iou, max_det=suppression.max_det, agnostic=suppression.agnostic,
            task=self.predictor.task,
        )  # fmt: skip

    def _predict(self, image: np.ndarray, windows: Tensor) -> tuple[Detections, Tensor]:
        """What is found in some windows of one size, in px of the image, and which of them each detection is from (n,)."""
        predictor, task = self.predictor, self.predictor.task
        views = [image[y1:y2, x1:x2] for x1, y1, x2, y2 in windows.tolist()]
        boxed = [predictor.fitted(view, self.input_hw) for view in views]
        images, placement = collate(boxed, [view.shape[:2] for view in views], predictor.device)
        suppressed = task.postprocess(predictor.forward(images), predictor.suppression)
        count = len(windows)
        hw = torch.tensor(image.shape[:2]).expand(count, -1)
        place = Letterbox(hw, torch.ones(count, 2), -windows[:, :2].float())  # a window is the image, shifted
        found: list[Detections] = []
        for each, detections in enumerate(suppressed):  # one after another: the masks of a batch of windows may be large
            one = slice(each, each + 1)
            found += task.to_original_compact(task.to_original([detections], placement.select(one)), place.select(one))
        return Detections.cat(found), torch.arange(count).repeat_interleave(torch.tensor([len(d) for d in found]))


@dataclass(frozen=True)
class SlicedEvaluation:
    """For an evaluation: the detections of a batch with those of its originals' windows.

    Attributes:
        predictor: For one image.
        read: Gives the original image of a path; raises ImageError where it cannot be read any more.
    """

    predictor: SlicedPredictor
    read: Callable[[str], np.ndarray]

    @staticmethod
    def of(predictor: SlicedPredictor, dataset: ImageDataset) -> SlicedEvaluation:
        """For the images of a data set."""
        return SlicedEvaluation(predictor, dataset.original)

    def __call__(self, batch: Batch, whole: Sequence[Detections]) -> list[Detections]:
        """The objects of a batch in compact form, given what was found on its whole images in px of the originals."""
        originals = _one_ahead(self.read, batch.paths)
        return [found if image is None else self.predictor.compact(image, found) for image, found in zip(originals, whole)]


def check_slices(task: Task, size: Sequence[int] | None) -> None:
    """Refuses windows for a task whose result is one of the whole image."""
    if size is not None and task.whole_image:
        raise UserError(f"--slice: windows are for objects in places, and the task {task.name!r} has one result an image; leave it out")


def _one_ahead(read: Callable[[str], np.ndarray], paths: Sequence[str]) -> Iterator[np.ndarray | None]:
    """Images in order, the next one decoded meanwhile; None for one that cannot be read any more, which the loader says."""
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(read, paths[0])
        for following in (*paths[1:], None):
            current, waiting = waiting, reader.submit(read, following) if following is not None else waiting
            try:
                yield current.result()
            except ImageError:
                yield None
