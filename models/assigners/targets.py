"""Ground truth of a batch as rectangular tensors, built without synchronising with the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from utils.boxes import cxcywh_to_xyxy, denormalised
from utils.types import Targets


class PaddedTargets(NamedTuple):
    """The boxes of each image, padded to the largest number of boxes in one image."""

    labels: Tensor  # (B, n) int64, 0 where there is no box
    boxes_xyxy: Tensor  # (B, n, 4) px, zeros where there is no box
    valid: Tensor  # (B, n) bool


def pad_targets(targets: Targets, max_boxes: int, *, batch_size: int, hw_px: tuple[float, float]) -> PaddedTargets:
    """Sorts a batch's targets by image.

    Args:
        targets: the objects of the batch, M in all, in any order.
        max_boxes: the largest number of boxes in one image, or more.
        batch_size: B.
        hw_px: size of the batch's images in px.

    Returns:
        Targets with n = ``max_boxes``; the order of an image's boxes is kept.
    """
    device = targets.boxes.device
    image, order = targets.image.sort(stable=True)
    per_image = torch.zeros(batch_size, dtype=torch.long, device=device).scatter_add_(0, image, torch.ones_like(image))
    first = per_image.cumsum(0) - per_image
    slot = torch.arange(len(image), device=device) - first[image]
    padded = torch.zeros(batch_size, max_boxes, 5, device=device)
    boxes_xyxy = cxcywh_to_xyxy(denormalised(targets.boxes[order].float(), hw_px))
    padded[image, slot] = torch.cat((targets.classes[order, None].float(), boxes_xyxy), dim=1)
    valid = torch.arange(max_boxes, device=device) < per_image[:, None]
    return PaddedTargets(padded[..., 0].long(), padded[..., 1:], valid)


def boxes_at(boxes: Tensor, index: Tensor) -> Tensor:
    """Boxes (B, n, 4) of each image at its own indices (B, R): (B, R, 4)."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


def can_count_without_wait(tensor: Tensor) -> bool:
    """Whether a result's size may depend on values: only on the CPU, since on a GPU the host would have to synchronise."""
    return tensor.device.type == "cpu"
