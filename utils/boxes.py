"""Boxes: their formats, their overlaps, and their way back from a letterboxed batch to the original images.

Formats are named in full everywhere: ``xyxy`` are two corners, ``cxcywh`` centre and size, ``ltwh`` left top corner and size (COCO's JSON).
Every function takes any leading shape, ``(0, 4)`` included, and returns a new tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils.types import Letterbox


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Corners to centre and size, (..., 4)."""
    low, high = boxes_xyxy.chunk(2, dim=-1)
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Centre and size to corners, (..., 4)."""
    centre, size = boxes_cxcywh.chunk(2, dim=-1)
    half = size / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_ltwh(boxes_xyxy: Tensor) -> Tensor:
    """Corners to left top corner and size, (..., 4)."""
    low, high = boxes_xyxy.chunk(2, dim=-1)
    return torch.cat((low, high - low), dim=-1)


def ltwh_to_xyxy(boxes_ltwh: Tensor) -> Tensor:
    """Left top corner and size to corners, (..., 4)."""
    low, size = boxes_ltwh.chunk(2, dim=-1)
    return torch.cat((low, low + size), dim=-1)


def normalised(boxes: Tensor, hw: tuple[float, float] | Tensor) -> Tensor:
    """Boxes in px of any of the three formats as fractions of an image's width and height.

    Args:
        boxes: (..., 4) px.
        hw: Height and width in px: one pair, or a tensor (..., 2) with a pair for every box.
    """
    return boxes / _whwh(hw, boxes)


def denormalised(boxes: Tensor, hw: tuple[float, float] | Tensor) -> Tensor:
    """The inverse of ``normalised``: fractions (..., 4) to px."""
    return boxes * _whwh(hw, boxes)


def clip_boxes(boxes_xyxy: Tensor, hw: tuple[float, float] | Tensor) -> Tensor:
    """Corners moved into the image.

    Args:
        boxes_xyxy: (..., 4) px.
        hw: Height and width in px: one pair, or a tensor (..., 2) with a pair for every box.
    """
    return torch.minimum(boxes_xyxy.clamp(min=0), _whwh(hw, boxes_xyxy))


def to_original(boxes_xyxy: Tensor, letterbox: Letterbox, *, image: Tensor, clip: bool = True) -> Tensor:
    """Boxes of a whole batch, from px of the batch image to px of each original image.

    Args:
        boxes_xyxy: (n, 4) px of the batch image, of all images together.
        letterbox: How each of the B images was scaled and padded.
        image: (n,) integers, which of the B images a box is on.
        clip: Whether corners outside the original image are moved to its border.

    Returns:
        (n, 4) xyxy px of the original images, on the device of ``boxes_xyxy``.
    """
    device = boxes_xyxy.device
    scale, pad, hw = (t.to(device)[image] for t in (letterbox.scale_xy, letterbox.pad_xy, letterbox.original_hw))  # (n, 2)
    boxes = (boxes_xyxy - pad.repeat(1, 2)) / scale.repeat(1, 2)
    return clip_boxes(boxes, hw) if clip else boxes


def to_batch(boxes_xyxy: Tensor, letterbox: Letterbox, *, image: Tensor) -> Tensor:
    """The way there: boxes (n, 4) in px of the original images, to px of the batch image; ``image`` (n,) says on which each is."""
    scale, pad = (t.to(boxes_xyxy.device)[image] for t in (letterbox.scale_xy, letterbox.pad_xy))  # (n, 2)
    return boxes_xyxy * scale.repeat(1, 2) + pad.repeat(1, 2)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Area (...) in px², zero for a box whose corners are the wrong way round."""
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0).prod(dim=-1)


def intersection(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Common area in px² of all pairs: (n, 4) and (m, 4) give (n, m)."""
    low = torch.maximum(boxes1_xyxy[:, None, :2], boxes2_xyxy[None, :, :2])
    high = torch.minimum(boxes1_xyxy[:, None, 2:], boxes2_xyxy[None, :, 2:])
    return (high - low).clamp(min=0).prod(dim=-1)


def box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Intersection over union of all pairs: (n, 4) and (m, 4) give (n, m)."""
    common = intersection(boxes1_xyxy, boxes2_xyxy)
    union = box_area(boxes1_xyxy)[:, None] + box_area(boxes2_xyxy)[None] - common
    return common / (union + eps)


def box_ioa(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Intersection over the area of the second box, all pairs: how much of each of ``boxes2`` is covered, (n, m)."""
    return intersection(boxes1_xyxy, boxes2_xyxy) / (box_area(boxes2_xyxy)[None] + eps)


def size_iou(wh1: Tensor, wh2: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Intersection over union of all pairs as if they had a common corner: widths and heights (n, 2), (m, 2) give (n, m)."""
    common = torch.minimum(wh1[:, None], wh2[None]).prod(dim=-1)
    return common / (wh1.prod(dim=-1)[:, None] + wh2.prod(dim=-1)[None] - common + eps)


def _whwh(hw: tuple[float, float] | Tensor, like: Tensor) -> Tensor:
    """Width, height, width, height (..., 4) of heights and widths, made without a copy from the host."""
    if isinstance(hw, Tensor):
        wh = hw.to(like).flip(-1)
        return torch.cat((wh, wh), dim=-1)
    out = like.new_full((4,), float(hw[1]))
    out[1::2] = float(hw[0])
    return out
