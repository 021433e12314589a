"""The plain formulas of masks, whole maps at a time, with which what the project computes in windows, bits and codes is compared.

Masks of detections are prototypes times coefficients (YOLACT, arXiv 1904.02689, section 3), cropped to their boxes, at any size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_logits(coefficients: Tensor, prototypes: Tensor) -> Tensor:
    """Coefficients (n, K) and prototypes (K, h, w) of one image to logits (n, h, w) in float32."""
    return (coefficients.float() @ prototypes.float().flatten(1)).unflatten(1, prototypes.shape[1:])


def cropped(masks: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Masks (n, h, w) with zeros outside of their boxes (n, 4), in cells of the mask: a cell stays where x1 <= column < x2, rows alike."""
    x1, y1, x2, y2 = boxes_xyxy.to(masks.device).unsqueeze(-1).unbind(1)  # (n, 1) each
    columns = torch.arange(masks.shape[2], device=masks.device, dtype=boxes_xyxy.dtype)
    rows = torch.arange(masks.shape[1], device=masks.device, dtype=boxes_xyxy.dtype)
    across = (columns >= x1) & (columns < x2)  # (n, w)
    down = (rows >= y1) & (rows < y2)  # (n, h)
    return masks * (down.unsqueeze(2) & across.unsqueeze(1)).to(masks.dtype)


def prototype_masks(logits: Tensor, boxes_xyxy: Tensor, input_hw: tuple[int, int]) -> Tensor:
    """Masks (n, h, w) uint8 at the size of the logits; boxes are in px of the network's input."""
    scale = boxes_xyxy.new_tensor([logits.shape[2] / input_hw[1], logits.shape[1] / input_hw[0]]).repeat(2)
    return cropped((logits > 0).to(torch.uint8), boxes_xyxy * scale)


def input_masks(logits: Tensor, boxes_xyxy: Tensor, input_hw: tuple[int, int]) -> Tensor:
    """Masks (n, *input_hw) uint8 at the size of the network's input, in whose px the boxes are."""
    return cropped((_resized(logits, input_hw) > 0).to(torch.uint8), boxes_xyxy)


def original_masks(logits: Tensor, boxes_xyxy: Tensor, *, input_hw: tuple[int, int], original_hw: tuple[int, int]) -> Tensor:
    """Masks (n, *original_hw) uint8 at the size of the original image, in whose px the boxes are.

    The border that the letterbox added is cut off the logits before they are resized.
    """
    (top, bottom), (left, right) = (_content(full, own, input_hw, original_hw) for full, own in zip(input_hw, original_hw))
    cell = input_hw[0] // logits.shape[1]
    if any(edge % cell for edge in (top, bottom, left, right)):  # the border does not end between two cells
        logits, cell = _resized(logits, input_hw), 1
    inside = logits[:, top // cell : bottom // cell, left // cell : right // cell]
    return cropped((_resized(inside, original_hw) > 0).to(torch.uint8), boxes_xyxy)


def _resized(maps: Tensor, hw: tuple[int, int]) -> Tensor:
    if len(maps) == 0 or tuple(maps.shape[1:]) == tuple(hw):
        return maps if tuple(maps.shape[1:]) == tuple(hw) else maps.new_zeros((len(maps), *hw))
    return F.interpolate(maps.unsqueeze(0), size=hw, mode="bilinear", align_corners=False)[0]


def _content(full: int, own: int, input_hw: tuple[int, int], original_hw: tuple[int, int]) -> tuple[int, int]:
    """The first and one past the last px of a side of the input that are the image and not the letterbox's border."""
    gain = min(input_hw[0] / original_hw[0], input_hw[1] / original_hw[1])
    border = (full - round(own * gain)) / 2
    return round(border - 0.1), full - round(border + 0.1)


def mask_iou(first: Tensor, second: Tensor, *, eps: float = 1e-7) -> Tensor:
    """IoU (n, m) of binary masks (n, h, w) and (m, h, w); 0 where both are empty."""
    a, b = first.flatten(1).float(), second.flatten(1).float()
    shared = a @ b.T
    either = a.sum(1, keepdim=True) + b.sum(1) - shared
    return shared / (either + eps)
