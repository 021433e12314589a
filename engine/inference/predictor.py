"""From images to detections in their own px: letterbox, network, suppression and the way back, for every script and every kind of network.

detect.py, val.py, torch.hub's model and sliced inference all go through ``Predictor``; what they have in hand decides where they enter:
original images (``predict``), letterboxed ones (``predict_letterboxed``) or a collated batch (``predict_batch``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.augment.centre_crop import fitted
from data.augment.letterbox import LetterboxedImage
from tasks import Task
from utils.nms import Suppression
from utils.precision import autocast
from utils.stopwatch import Stopwatch
from utils.types import Detections, Letterbox, Predictions, to_unit_range

PRE_PROCESS, INFERENCE, NMS = STAGES = ("pre-process", "inference", "NMS")


class Network(Protocol):
    """What a predictor runs: a ``Model``, an exported file, several as one, or either with test-time augmentation."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def nc(self) -> int: ...
    @property
    def ch(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def task(self) -> Task: ...

    def predict(self, images: Tensor, *, above: float = 0.0) -> Predictions:
        """Predictions for images (B, ch, H, W) in 0-1; candidates whose scores are not above ``above`` may be left out."""


def fixed_size(network: Network) -> tuple[int, int] | None:
    """Height and width in px that an exported file of fixed size takes; None for a network that takes any multiple of its stride."""
    return None if getattr(network, "dynamic", True) else network.imgsz  # type: ignore[attr-defined]


class Predictor:
    """A network with suppression as one function from images to detections.

    Args:
        network: What is run; ready for inference, on ``device``.
        suppression: What is kept of its predictions.
        device: Where images are sent.
        precision: Type of the forward pass under autocast; float32 if None.
        stopwatch: Takes the seconds of ``STAGES``; one of its own if None.

    Attributes:
        dynamic: Whether images of any size (multiples of ``stride``) can go in.
        imgsz: Height and width in px that a network of fixed size takes; None for a dynamic one.
    """

    def __init__(
        self,
        network: Network,
        suppression: Suppression,
        *,
        device: torch.device,
        precision: torch.dtype | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.network, self.suppression, self.device, self.precision = network, suppression, device, precision
        self.stopwatch = stopwatch or Stopwatch(device, STAGES)
        self.names, self.nc, self.ch, self.stride, self.task = network.names, network.nc, network.ch, network.stride, network.task
        self.imgsz = fixed_size(network)
        self.dynamic = self.imgsz is None

    def predict(self, images: Sequence[NDArray], *, hw: tuple[int, int] | None = None) -> list[Detections]:
        """Detections of original images (H, W, C), uint8 or uint16, each in px of its image, on the host.

        Args:
            images: Of any sizes; those whose letterboxed shapes agree go through the network together.
            hw: Height and width in px that images are fitted into, multiples of the stride; the task's usual size if None. A fixed
                network's own size wins.
        """
        hw = self.task.defaults.input_hw(self.imgsz or hw)
        boxed = [self.fitted(image, hw) for image in images]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, one in enumerate(boxed):
            groups.setdefault(one.image.shape, []).append(index)
        found: list[Detections] = [Detections.empty()] * len(images)
        for members in groups.values():
            detections = self.predict_letterboxed([boxed[i] for i in members], [images[i].shape[:2] for i in members])
            for index, one_found in zip(members, detections):
                found[index] = one_found
        return found

    def fitted(self, image: NDArray, hw: tuple[int, int]) -> LetterboxedImage:
        """An original (H, W, C) as the network's input of ``hw`` px at most: letterboxed, or cropped for a result of the whole image."""
        return fitted(image, hw, whole_image=self.task.whole_image, auto=self.dynamic, stride=self.stride)

    def predict_letterboxed(self, boxed: Sequence[LetterboxedImage], original_hw: Sequence[tuple[int, ...]]) -> list[Detections]:
        """Detections of letterboxed images of one shape, in px of their originals, on the host."""
        with self.stopwatch.stage(PRE_PROCESS):
            images, placement = collate(boxed, original_hw, self.device)
        return self.predict_batch(images, placement)

    def predict_batch(self, images: Tensor, placement: Letterbox) -> list[Detections]:
        """Detections of a batch (B, C, H, W) in 0-1 on the device, in px of the original images, on the host."""
        with self.stopwatch.stage(INFERENCE):
            predictions = self.forward(images)
        return self.detections(predictions, placement)

    def forward(self, images: Tensor) -> Predictions:
        """Predictions of a batch (B, C, H, W) in 0-1, as far as they can pass the suppression's threshold."""
        with torch.no_grad(), autocast(self.device, self.precision):
            return self.network.predict(images, above=self.suppression.conf)

    def detections(self, predictions: Predictions, placement: Letterbox, *, compact: bool = False) -> list[Detections]:
        """What suppression keeps of predictions, in px of the original images, on the host; of a task's small form if ``compact``."""
        with self.stopwatch.stage(NMS):
            found = self.task.postprocess(predictions, self.suppression)
            return self.task.to_original_compact(found, placement) if compact else self.task.to_original(found, placement)


def collate(boxed: Sequence[LetterboxedImage], original_hw: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Letterbox]:
    """Letterboxed images of one shape as a batch (B, C, H, W) in 0-1 on the device, and how they came from their originals."""
    stacked = boxed[0].image[None] if len(boxed) == 1 else np.stack([b.image for b in boxed])
    images = torch.from_numpy(stacked).to(device).permute(0, 3, 1, 2).contiguous()  # (B, C, H, W)
    placement = Letterbox(
        original_hw=torch.tensor([tuple(hw) for hw in original_hw]),
        scale_xy=torch.tensor([b.scale_xy for b in boxed], dtype=torch.float32),
        pad_xy=torch.tensor([b.pad_xy for b in boxed], dtype=torch.float32),
    )
    return to_unit_range(images), placement
