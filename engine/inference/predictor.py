"""From images to boxes in their own px: the two ends of every look, shared by detect.py and torch.hub's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from utils.boxes import to_original
from utils.types import Detections, Letterbox, to_unit_range

if TYPE_CHECKING:
    from data.sources.frames import Frame


def as_batch(frames: Sequence[Frame], device: torch.device) -> tuple[Tensor, Letterbox]:
    """The letterboxed images, of one shape, as a batch in 0-1, and how they came from the originals."""
    boxed = [frame.boxed for frame in frames]
    stacked = boxed[0].image[None] if len(boxed) == 1 else np.stack([b.image for b in boxed])
    images = torch.from_numpy(stacked).to(device).permute(0, 3, 1, 2).contiguous()  # (B, C, H, W)
    letterbox = Letterbox(
        original_hw=torch.tensor([frame.image.shape[:2] for frame in frames]),
        scale_xy=torch.tensor([b.scale_xy for b in boxed], dtype=torch.float32),
        pad_xy=torch.tensor([b.pad_xy for b in boxed], dtype=torch.float32),
    )
    return to_unit_range(images), letterbox


def in_original_px(found: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
    """Detections of a batch, image by image, in px of the originals, on the host."""
    return [_in_original_px(detections, letterbox, index) for index, detections in enumerate(found)]


def _in_original_px(found: Detections, letterbox: Letterbox, index: int) -> Detections:
    boxes = to_original(found.boxes.float(), letterbox, image=torch.full_like(found.classes, index))
    return found._replace(boxes=boxes.cpu(), scores=found.scores.float().cpu(), classes=found.classes.cpu())
