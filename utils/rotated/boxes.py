"""Rotated boxes: centre, size and angle, their corners, and their way between images of different scale.

A rotated box is the box (w, h) about its centre, turned by its angle in radians. x points right and y down, so a positive angle turns
clockwise as one sees it; at angle 0 the box is axis-aligned and w is its width. Batches keep it as ``boxes`` xyxy, the box before it is
turned, with the angle (…, 1) beside it; geometry takes ``cxcywha`` (…, 5): centre, size, angle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from utils.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh


def rotated_boxes(boxes_xyxy: Tensor, angle: Tensor) -> Tensor:
    """Boxes (…, 4) before they are turned, and their angles (…, 1), as ``cxcywha`` (…, 5)."""
    return torch.cat((xyxy_to_cxcywh(boxes_xyxy), angle), dim=-1)


def unrotated(boxes_cxcywha: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`rotated_boxes`: (…, 4) xyxy and (…, 1)."""
    box, angle = boxes_cxcywha.split((4, 1), dim=-1)
    return cxcywh_to_xyxy(box), angle


def corners_of(boxes_cxcywha: Tensor) -> Tensor:
    """Corners (…, 4, 2) of rotated boxes (…, 5): centre + u + v, + u − v, − u − v, − u + v, u and v half the sides as vectors."""
    centre, size, angle = boxes_cxcywha.split((2, 2, 1), dim=-1)
    half_w, half_h = (size / 2).split(1, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    u = torch.cat((half_w * cos, half_w * sin), dim=-1)
    v = torch.cat((-half_h * sin, half_h * cos), dim=-1)
    return torch.stack((centre + u + v, centre + u - v, centre - u - v, centre - u + v), dim=-2)


def extents(boxes_cxcywha: Tensor) -> Tensor:
    """The smallest axis-aligned boxes (…, 4) xyxy that hold rotated boxes (…, 5)."""
    centre, size, angle = boxes_cxcywha.split((2, 2, 1), dim=-1)
    cos, sin = angle.cos().abs(), angle.sin().abs()
    w, h = (size / 2).split(1, dim=-1)
    half = torch.cat((w * cos + h * sin, w * sin + h * cos), dim=-1)
    return torch.cat((centre - half, centre + half), dim=-1)


def regularised(boxes_cxcywha: Tensor) -> Tensor:
    """The same boxes (…, 5) with an angle in [0, π/2): width and height change places where that takes a quarter turn."""
    centre, size, angle = boxes_cxcywha.split((2, 2, 1), dim=-1)
    swapped = angle % math.pi >= math.pi / 2
    return torch.cat((centre, torch.where(swapped, size.flip(-1), size), angle % (math.pi / 2)), dim=-1)


def rescaled(boxes_cxcywha: Tensor, scale_xy: Tensor, shift_xy: Tensor) -> Tensor:
    """Boxes (…, 5) under ``xy -> xy * scale_xy + shift_xy``.

    Where the two scales differ, a rectangle becomes a parallelogram; what is kept is the direction and length of its first side, and its
    area. So the way back gives exactly the box that came in.

    Args:
        boxes_cxcywha: in px.
        scale_xy: (…, 2), positive.
        shift_xy: (…, 2) px.
    """
    centre, size, angle = boxes_cxcywha.split((2, 2, 1), dim=-1)
    side = torch.cat((angle.cos(), angle.sin()), dim=-1) * scale_xy
    stretch = side.norm(dim=-1, keepdim=True)
    turned = torch.atan2(side[..., 1:], side[..., :1]) - torch.atan2(angle.sin(), angle.cos())  # keeps the number of turns of the angle
    turned = turned - 2 * math.pi * (turned / (2 * math.pi)).round()
    area = scale_xy.prod(dim=-1, keepdim=True)
    return torch.cat((centre * scale_xy + shift_xy, size * torch.cat((stretch, area / stretch), dim=-1), angle + turned), dim=-1)
