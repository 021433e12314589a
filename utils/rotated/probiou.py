"""Probabilistic IoU: rotated boxes as Gaussians, and how alike two of these are.

Gaussian Bounding Boxes and Probabilistic Intersection-over-Union for Object Detection, arXiv 2106.06072. A box (w, h) is the Gaussian with
the variances w²/12 and h²/12 along its sides, those of a uniform distribution over it. ProbIoU is 1 − H, H the Hellinger distance of two
Gaussians, √(1 − exp(−B)) with B their Bhattacharyya distance (section 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-7
LARGEST = 100.0  # of the Bhattacharyya distance; exp(−100) is nothing
LOSS_FLOOR = 0.01  # squared strides added to the variances in the box loss, so that a side of zero has a gradient


def gaussian_terms(boxes_cxcywha: Tensor, *, floor: float = 0.0) -> Tensor:
    """What ProbIoU needs to know of each box (…, 5) alone: (6, …) centre x and y, variances of x and y, covariance, determinant; px.

    Args:
        boxes_cxcywha: centre, size in px, angle in radians.
        floor: px² added to both variances along the sides.
    """
    x, y, w, h, angle = boxes_cxcywha.unbind(-1)
    along, across = w * w / 12 + floor, h * h / 12 + floor
    cos, sin = angle.cos(), angle.sin()
    cos2, sin2 = cos * cos, sin * sin
    var_x, var_y, cov = along * cos2 + across * sin2, along * sin2 + across * cos2, (along - across) * cos * sin
    return torch.stack((x, y, var_x, var_y, cov, (var_x * var_y - cov * cov).clamp(min=0)))


def probiou_of_terms(terms1: Tensor, terms2: Tensor) -> Tensor:
    """ProbIoU (…) in 0-1 of :func:`gaussian_terms` (6, …) whose trailing shapes broadcast."""
    x1, y1, a1, b1, c1, det1 = terms1.unbind()
    x2, y2, a2, b2, c2, det2 = terms2.unbind()
    a, b, c, dx, dy = a1 + a2, b1 + b2, c1 + c2, x1 - x2, y1 - y2
    det = a * b - c * c
    away = (a * dy * dy + b * dx * dx) / (det + EPS) / 4 - c * dx * dy / (det + EPS) / 2
    unlike = torch.log(det / (4 * (det1 * det2).sqrt() + EPS) + EPS) / 2
    distance = (away + unlike).clamp(EPS, LARGEST)
    return 1 - (1 - torch.exp(-distance) + EPS).sqrt()


def probiou(boxes1_cxcywha: Tensor, boxes2_cxcywha: Tensor, *, floor: float = 0.0, aspect: bool = False) -> Tensor:
    """ProbIoU (…) of boxes (…, 5) whose leading shapes broadcast.

    Args:
        boxes1_cxcywha: in px, radians.
        boxes2_cxcywha: the same.
        floor: px² added to the variances.
        aspect: subtract CIoU's term for the difference of the aspect ratios, whose weight is a constant for the gradient
            (arXiv 1911.08287, eq. 8-11).
    """
    overlap = probiou_of_terms(gaussian_terms(boxes1_cxcywha, floor=floor), gaussian_terms(boxes2_cxcywha, floor=floor))
    if not aspect:
        return overlap
    ratio1, ratio2 = (torch.atan(boxes[..., 2] / (boxes[..., 3] + EPS)) for boxes in (boxes1_cxcywha, boxes2_cxcywha))
    v = (2 / math.pi * (ratio2 - ratio1)) ** 2
    weight = (v / (v - overlap + (1 + EPS))).detach()
    return overlap - v * weight


def probiou_matrix(boxes1_cxcywha: Tensor, boxes2_cxcywha: Tensor) -> Tensor:
    """ProbIoU of all pairs: (n, 5) and (m, 5) give (n, m)."""
    return probiou_of_terms(gaussian_terms(boxes1_cxcywha)[..., None], gaussian_terms(boxes2_cxcywha)[:, None])
