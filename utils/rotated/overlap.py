"""The exact overlap of rotated boxes as polygons.

In the frame of the second box the common area is ∫ clamp(y, −h/2, h/2) dx around the first box's outline, taken where |x| ≤ w/2: at each x
that is the length of the common part of two vertical lines. An edge's share has a closed form, so that there is no polygon to construct,
no order of corners to find and no case of touching or equal edges to fail in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils.rotated.boxes import corners_of


def rotated_intersection(boxes1_cxcywha: Tensor, boxes2_cxcywha: Tensor) -> Tensor:
    """Common area (…) in px² of rotated boxes (…, 5) whose leading shapes broadcast; a negative side counts as 0."""
    x, y = _in_frame(_with_sides(boxes1_cxcywha), boxes2_cxcywha)  # (…, 4) corners in order
    half_w, half_h = (boxes2_cxcywha[..., 2:4].clamp(min=0) / 2).split(1, dim=-1)
    next_x, next_y = x.roll(-1, dims=-1), y.roll(-1, dims=-1)
    width, start, end = next_x - x, _within(x, half_w), _within(next_x, half_w)
    run = torch.where(width == 0, 1, width)  # an upright edge has no share
    from_y, to_y = (y + ((at - x) / run).clamp(0, 1) * (next_y - y) for at in (start, end))
    share = (end - start) * _mean_clamped(from_y, to_y, half_h)
    return share.sum(dim=-1).abs()


def rotated_iou(boxes1_cxcywha: Tensor, boxes2_cxcywha: Tensor, *, eps: float = 1e-9) -> Tensor:
    """Intersection over union (…) of rotated boxes (…, 5) whose leading shapes broadcast."""
    common = rotated_intersection(boxes1_cxcywha, boxes2_cxcywha)
    return common / (rotated_area(boxes1_cxcywha) + rotated_area(boxes2_cxcywha) - common + eps)


def rotated_iou_matrix(boxes1_cxcywha: Tensor, boxes2_cxcywha: Tensor) -> Tensor:
    """Intersection over union of all pairs: (n, 5) and (m, 5) give (n, m)."""
    return rotated_iou(boxes1_cxcywha[:, None], boxes2_cxcywha[None])


def rotated_area(boxes_cxcywha: Tensor) -> Tensor:
    """Area (…) in px²; a negative side counts as 0."""
    return boxes_cxcywha[..., 2:4].clamp(min=0).prod(dim=-1)


def _with_sides(boxes_cxcywha: Tensor) -> Tensor:
    return torch.cat((boxes_cxcywha[..., :2], boxes_cxcywha[..., 2:4].clamp(min=0), boxes_cxcywha[..., 4:]), dim=-1)


def _in_frame(boxes1_cxcywha: Tensor, boxes2_cxcywha: Tensor) -> tuple[Tensor, Tensor]:
    """x and y (…, 4) of the first boxes' corners, seen from the centre of the second ones along their sides."""
    offset = corners_of(boxes1_cxcywha) - boxes2_cxcywha[..., None, :2]
    cos, sin = boxes2_cxcywha[..., 4:].cos(), boxes2_cxcywha[..., 4:].sin()
    dx, dy = offset.unbind(-1)
    return dx * cos + dy * sin, dy * cos - dx * sin


def _within(values: Tensor, limit: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(values, -limit), limit)


def _mean_clamped(first: Tensor, last: Tensor, limit: Tensor) -> Tensor:
    """The mean of a value that goes evenly from ``first`` to ``last``, moved into ± ``limit``."""
    return (first + last) / 2 - _mean_positive(first - limit, last - limit) + _mean_positive(-limit - first, -limit - last)


def _mean_positive(first: Tensor, last: Tensor) -> Tensor:
    """The mean of the positive part of a value that goes evenly from ``first`` to ``last``."""
    low, high = torch.minimum(first, last), torch.maximum(first, last)
    part = high.clamp(min=0) ** 2 / (2 * (high - low).clamp(min=torch.finfo(high.dtype).tiny))
    return torch.where(low >= 0, (first + last) / 2, part)
