"""A closer look at images: window by window through the network, what all windows found united with what was found on the whole image.

detect.py calls a ``SlicedPredictor`` for every frame, val.py through ``sliced_evaluation`` for every batch. Windows are cut from the
original image and letterboxed like an image of their size; memory holds one batch of them, whatever the image's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.augment.letterbox import letterbox
from data.images.reading import ImageError
from engine.inference.slicing import Seen, merge_looks, slice_windows
from utils.boxes import to_original
from utils.types import Batch, Detections, Letterbox, Predictions, to_unit_range

if TYPE_CHECKING:
    from data.dataset import ImageDataset

WINDOWS_AT_ONCE = 8  # in detect.py; val.py takes its batch size


@dataclass(frozen=True)
class SlicedPredictor:
    """Looks at an image through windows, too.

    Attributes:
        predict: The network: images (B, C, H, W) in 0-1 to predictions.
        suppress: What follows it, with its thresholds.
        size_hw: Height and width of a window in px of the image.
        overlap: Least common part of neighbouring windows, a fraction of their sides.
        input_hw: Height and width that windows are fitted into for the network, px.
        stride: Of the model, px.
        fixed: Whether the network takes ``input_hw`` only.
        device: Where the network is.
        iou: Overlap that ``suppress`` uses.
        max_det: The most boxes of an image.
        agnostic: Boxes compete across classes.
        batch: Windows that the network sees at once.
    """

    predict: Callable[[Tensor], Predictions]
    suppress: Callable[[Predictions], list[Detections]]
    size_hw: tuple[int, int]
    overlap: float
    input_hw: tuple[int, int]
    stride: int
    fixed: bool
    device: torch.device
    iou: float
    max_det: int
    agnostic: bool = False
    batch: int = WINDOWS_AT_ONCE

    def windows(self, hw: tuple[int, int]) -> Tensor:
        """The windows (n, 4) xyxy px of an image; none where it fits into one, as the whole image is looked at anyway."""
        windows = slice_windows(hw, self.size_hw, self.overlap)
        return windows if len(windows) > 1 else windows[:0]

    def __call__(self, image: np.ndarray, whole: Detections) -> Detections:
        """The objects of an image (H, W, C), integers or floats in 0-1.

        Args:
            image: The original.
            whole: What was found on the whole image, in px of the original, on the CPU.
        """
        hw = (image.shape[0], image.shape[1])
        windows = self.windows(hw)
        if not len(windows):
            return whole
        places = torch.tensor([(0, 0, hw[1], hw[0])]).expand(len(whole.scores), -1)
        seen = [Seen(*whole, windows=places.float(), look=torch.zeros(len(whole.scores), dtype=torch.long))]
        for part in torch.arange(len(windows)).split(self.batch):
            found, window = self._look(image, windows[part])
            seen.append(Seen(*found, windows=windows[part][window].float(), look=1 + part[window]))
        together = Seen(*(torch.cat(columns) for columns in zip(*seen)))
        return merge_looks(together, hw, iou=self.iou, max_det=self.max_det, agnostic=self.agnostic)

    def _look(self, image: np.ndarray, windows: Tensor) -> tuple[Detections, Tensor]:
        """What is found in some windows of one size, in px of the image, and which of them each box is from (n,)."""
        views = [image[y1:y2, x1:x2] for x1, y1, x2, y2 in windows.tolist()]
        boxed = [letterbox(view, self.input_hw, auto=not self.fixed, stride=self.stride) for view in views]
        images = torch.from_numpy(np.stack([b.image for b in boxed])).to(self.device).permute(0, 3, 1, 2)  # (B, C, H, W)
        found = self.suppress(self.predict(to_unit_range(images)))
        window = torch.arange(len(found)).repeat_interleave(torch.tensor([len(d.scores) for d in found]))
        columns = [torch.cat((d.boxes.float(), d.scores.float()[:, None], d.classes.float()[:, None]), dim=1) for d in found]
        rows = torch.cat(columns).cpu()  # (n, 6), in one transfer
        place = Letterbox(
            original_hw=torch.tensor([view.shape[:2] for view in views]),
            scale_xy=torch.tensor([b.scale_xy for b in boxed], dtype=torch.float32),
            pad_xy=torch.tensor([b.pad_xy for b in boxed], dtype=torch.float32),
        )
        boxes = to_original(rows[:, :4], place, image=window) + windows[window][:, :2].repeat(1, 2)
        return Detections(boxes, rows[:, 4], rows[:, 5].long()), window


def sliced_evaluation(look: SlicedPredictor, dataset: ImageDataset) -> Callable[[Batch, Sequence[Detections]], list[Detections]]:
    """For an evaluation: what is found on the originals of a batch, given what was found on its whole images in px of the originals."""

    def closer(batch: Batch, whole: Sequence[Detections]) -> list[Detections]:
        originals = _one_ahead(dataset.original, batch.paths)
        return [found if image is None else look(image, found) for image, found in zip(originals, whole)]

    return closer


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
