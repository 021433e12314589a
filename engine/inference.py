"""From one picture to boxes in its own px: the two ends of every look at a picture, shared by detect.py and torch.hub's model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.boxes import to_original
from utils.types import Detections, Letterbox, to_unit_range

if TYPE_CHECKING:
    from data.sources import Frame


def as_batch(frame: Frame, device: torch.device) -> tuple[Tensor, Letterbox]:
    """The letterboxed picture as a batch of one, 0-1, and how it came from the original."""
    image = torch.from_numpy(frame.boxed.image).to(device).permute(2, 0, 1)[None].contiguous()  # (1, C, H, W)
    letterbox = Letterbox(
        original_hw=torch.tensor([frame.image.shape[:2]]),
        scale_xy=torch.tensor([frame.boxed.scale_xy], dtype=torch.float32),
        pad_xy=torch.tensor([frame.boxed.pad_xy], dtype=torch.float32),
    )
    return to_unit_range(image), letterbox


def in_original_px(found: Detections, letterbox: Letterbox) -> Detections:
    """Detections of a batch of one in px of the original picture, on the host."""
    boxes = to_original(found.boxes.float(), letterbox, image=torch.zeros_like(found.classes))
    return found._replace(boxes=boxes.cpu(), scores=found.scores.float().cpu(), classes=found.classes.cpu())
