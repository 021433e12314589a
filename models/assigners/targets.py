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
    """Sorts a batch's targets by image, without a sort.

    Args:
        targets: the objects of the batch, M in all, in any order.
        max_boxes: the largest number of boxes in one image, or more.
        batch_size: B.
        hw_px: size of the batch's images in px.

    Returns:
        Targets with n = ``max_boxes``; the order of an image's boxes is kept.
    """
    device = targets.boxes.device
    on_image = targets.image[:, None] == torch.arange(batch_size, device=device)  # (M, B)
    slot = on_image.cumsum(0).gather(1, targets.image[:, None]).squeeze(1) - 1  # the how manyth of its image
    rows = torch.cat((targets.boxes.float(), targets.classes[:, None].float()), dim=1)
    padded = torch.full((batch_size, max_boxes, 5), -1.0, device=device)
    padded[targets.image, slot] = rows
    labels, boxes = padded[..., 4], padded[..., :4]
    valid = labels >= 0
    boxes_xyxy = denormalised(cxcywh_to_xyxy(boxes), hw_px) * valid[..., None]
    return PaddedTargets(labels.clamp(min=0).long(), boxes_xyxy, valid)


def rows_of_places(image: Tensor, *, batch_size: int, max_boxes: int) -> Tensor:
    """For each place (B, n) of :class:`PaddedTargets` the object's row in the batch, int64; 0 where there is no box.

    Args:
        image: (M,) int64, which image each object is of.
        batch_size: B.
        max_boxes: n.
    """
    on_image = image[:, None] == torch.arange(batch_size, device=image.device)  # (M, B)
    slot = on_image.cumsum(0).gather(1, image[:, None]).squeeze(1) - 1
    rows = torch.zeros(batch_size, max_boxes, dtype=torch.long, device=image.device)
    rows[image, slot] = torch.arange(len(image), device=image.device)
    return rows


def bucket(max_boxes: int) -> int:
    """A power of two, at least 16, to which compiled graphs pad ``max_boxes``, so that they are few."""
    return 1 << max(max_boxes - 1, 15).bit_length()


def boxes_at(boxes: Tensor, index: Tensor) -> Tensor:
    """Boxes (B, n, 4) of each image at its own indices (B, R): (B, R, 4)."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


def can_count_without_wait(tensor: Tensor) -> bool:
    """Whether a result's size may depend on values: on a GPU the host would have to synchronise, and a compiled graph has fixed sizes."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
