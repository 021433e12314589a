"""The value types that cross package borders: what a batch, a prediction and a detection are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Letterbox(NamedTuple):
    """How each image of a batch came from its original: ``xy_batch = xy_original * scale_xy + pad_xy``."""

    original_hw: Tensor  # (B, 2) int64, height and width of the original image in px
    scale_xy: Tensor  # (B, 2) float32
    pad_xy: Tensor  # (B, 2) float32, px of border at the left and at the top


class Batch(NamedTuple):
    """A collated batch, as the loader yields it and the training step takes it."""

    images: Tensor  # (B, C, H, W) uint8 or uint16, RGB order for three channels
    targets: Tensor  # (M, 6) float32 [image, class, cx, cy, w, h], boxes normalised to the batch image
    paths: tuple[str, ...]  # B file paths
    letterbox: Letterbox
    max_boxes: int  # the most boxes in one image, known on the host so that the loss never asks the device
    unreadable: tuple[tuple[str, str], ...] = ()  # path and reason of images that grey had to take the place of
    step_images: int | None = None  # images of this step over all ranks, if more; 0: takes part, counts nowhere

    @property
    def images_of_step(self) -> int:
        """Images of this step over all processes; 0 where this batch counts nowhere."""
        return len(self.images) if self.step_images is None else self.step_images

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The batch with images and targets on ``device``; what only reports need stays on the host."""
        return self._replace(
            images=self.images.to(device, non_blocking=non_blocking), targets=self.targets.to(device, non_blocking=non_blocking)
        )


class Predictions(NamedTuple):
    """What a head decodes to, before non-maximum suppression."""

    boxes: Tensor  # (B, N, 4) xyxy px of the network's input
    scores: Tensor  # (B, N, C) in 0-1


class Detections(NamedTuple):
    """What is left of one image after non-maximum suppression, best score first."""

    boxes: Tensor  # (n, 4) xyxy px
    scores: Tensor  # (n,)
    classes: Tensor  # (n,) int64


def to_unit_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integer images (uint8 or uint16) as floats in 0-1; float images are only cast. Batches come out channels-last in memory.

    This is the one place where pixel values become network input. Channels-last is the layout that convolutions run fastest in, on the
    CPU as on tensor cores; shapes stay (B, C, H, W).
    """
    layout = torch.channels_last if images.dim() == 4 else torch.preserve_format
    if images.dtype == torch.uint8:
        return images.to(dtype, memory_format=layout) / 255
    if images.dtype == torch.uint16:
        return (images.to(torch.float32, memory_format=layout) / 65535).to(dtype)
    if images.is_floating_point():
        return images.to(dtype, memory_format=layout)
    raise TypeError(f"images must be uint8, uint16 or float, not {images.dtype}")
