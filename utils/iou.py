"""How well two boxes fit: the IoU family as pure functions of aligned boxes, and the regression losses made from them.

Every similarity takes two tensors (..., 4) of corners in px whose leading shapes broadcast, and gives (...), 1 for equal boxes. With
b the predicted and g the true box, I and U their intersection and union, C their smallest common enclosing box (width c_w, height c_h,
squared diagonal c²), ρ² the squared distance of their centres:

=========  ============================================================  ===========================
IoU        |I| / |U|
GIoU       IoU − (|C| − |U|) / |C|                                       arXiv 1902.09630, alg. 1
DIoU       IoU − ρ²/c²                                                   arXiv 1911.08287, eq. 7
CIoU       DIoU − αv, v = 4/π² (atan w_g/h_g − atan w/h)²,               arXiv 1911.08287, eq. 8–11
           α = v / (1 − IoU + v), constant for the gradient
EIoU       DIoU − (w − w_g)²/c_w² − (h − h_g)²/c_h²                      arXiv 2101.08158, eq. 6
SIoU       IoU − (Δ + Ω)/2, see :func:`siou`                             arXiv 2205.12740, eq. 1–7
MDPIoU     IoU − (d₁² + d₂²)/(W² + H²), d of equal corners,              arXiv 2307.07662, eq. 7–10
           W × H the image
NWD        exp(−W₂/K), W₂ the distance of the boxes as Gaussians         arXiv 2110.13389, eq. 8–9
alpha-X    every term of X to the power 3                                arXiv 2110.13675, eq. 4
Inner-X    X − IoU + IoU of the boxes scaled by 0.7                      arXiv 2311.02877, eq. 5–12
Focaler-X  X − IoU + clip((IoU − d)/(u − d), 0, 1), d = 0, u = 0.95      arXiv 2401.10525, eq. 1–2
=========  ============================================================  ===========================

The last three and WIoU, a loss with a memory, stand in ``models/losses/box.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-7


class Pair(NamedTuple):
    """What all members of the family need to know of two boxes; every entry has the broadcast leading shape, px or px²."""

    intersection: Tensor
    union: Tensor
    iou: Tensor
    size1: tuple[Tensor, Tensor]  # width and height
    size2: tuple[Tensor, Tensor]
    enclosing: tuple[Tensor, Tensor]  # width and height of the smallest common box
    offset: tuple[Tensor, Tensor]  # centre 2 minus centre 1

    @property
    def distance2(self) -> Tensor:
        """ρ²."""
        return self.offset[0] ** 2 + self.offset[1] ** 2

    @property
    def diagonal2(self) -> Tensor:
        """c²."""
        return self.enclosing[0] ** 2 + self.enclosing[1] ** 2 + EPS


def compare(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Pair:
    """The common quantities of two broadcastable sets of boxes (..., 4)."""
    (left1, top1, right1, bottom1), (left2, top2, right2, bottom2) = sides1, sides2 = boxes1_xyxy.unbind(-1), boxes2_xyxy.unbind(-1)
    sizes = (right1 - left1, bottom1 - top1), (right2 - left2, bottom2 - top2)
    intersection, union = _common_and_union(sides1, sides2, *sizes)
    enclosing = (
        torch.maximum(right1, right2) - torch.minimum(left1, left2),
        torch.maximum(bottom1, bottom2) - torch.minimum(top1, top2),
    )
    offset = ((left2 + right2 - left1 - right1) / 2, (top2 + bottom2 - top1 - bottom1) / 2)
    return Pair(intersection, union, intersection / union, *sizes, enclosing, offset)


def common_and_union(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Areas |I| and |U| (...) px² of two broadcastable sets of boxes (..., 4)."""
    (left1, top1, right1, bottom1), (left2, top2, right2, bottom2) = sides1, sides2 = boxes1_xyxy.unbind(-1), boxes2_xyxy.unbind(-1)
    return _common_and_union(sides1, sides2, (right1 - left1, bottom1 - top1), (right2 - left2, bottom2 - top2))


def _common_and_union(
    sides1: Sequence[Tensor], sides2: Sequence[Tensor], size1: tuple[Tensor, Tensor], size2: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    (left1, top1, right1, bottom1), (left2, top2, right2, bottom2) = sides1, sides2
    common_w = (torch.minimum(right1, right2) - torch.maximum(left1, left2)).clamp(min=0)
    common_h = (torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2)).clamp(min=0)
    intersection = common_w * common_h
    areas = size1[0] * size1[1] + size2[0] * size2[1]
    return intersection, areas - intersection + EPS


def iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, *, alpha: float = 1.0) -> Tensor:
    """|I| / |U|. See the table above."""
    intersection, union = common_and_union(boxes1_xyxy, boxes2_xyxy)
    return _power(intersection / union, alpha)


def giou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Generalised IoU. See the table above."""
    pair = compare(boxes1_xyxy, boxes2_xyxy)
    area = pair.enclosing[0] * pair.enclosing[1] + EPS
    return _power(pair.iou, alpha) - _power((area - pair.union) / area, alpha)


def diou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Distance IoU. See the table above."""
    pair = compare(boxes1_xyxy, boxes2_xyxy)
    return _power(pair.iou, alpha) - _power(pair.distance2 / pair.diagonal2, alpha)


def ciou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Complete IoU. See the table above."""
    dims = max(boxes1_xyxy.dim(), boxes2_xyxy.dim())
    terms1, terms2 = (ciou_terms(boxes[(None,) * (dims - boxes.dim())]) for boxes in (boxes1_xyxy, boxes2_xyxy))
    return ciou_of_terms(terms1, terms2, alpha=alpha)


def ciou_terms(boxes_xyxy: Tensor) -> Tensor:
    """What CIoU needs to know of each box (..., 4) alone, so that a box that is compared often is prepared once.

    Returns:
        (8, ...): −left, −top, right, bottom (the smaller of two such is the side of the intersection, the greater of the enclosing box);
        centre x and y; area; 2/π · atan(w/h). px and px².
    """
    low, high = boxes_xyxy.movedim(-1, 0).split(2)
    width, height = (high - low).unbind()
    angle = torch.atan(width / (height + EPS)) * (2 / math.pi)
    return torch.cat((-low, high, (low + high) / 2, (width * height)[None], angle[None]))


def ciou_of_terms(terms1: Tensor, terms2: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Complete IoU (...) of :func:`ciou_terms` (8, ...) whose trailing shapes broadcast."""
    sides1, centre1, area1, angle1 = terms1.split((4, 2, 1, 1))
    sides2, centre2, area2, angle2 = terms2.split((4, 2, 1, 1))
    low, high = torch.minimum(sides1, sides2).split(2)
    width, height = (low + high).clamp(min=0).unbind()
    common = width * height
    overlap = common / (area1[0] + area2[0] - common + EPS)
    low, high = torch.maximum(sides1, sides2).split(2)
    distance2, diagonal2 = (_squared_norm(v) for v in (centre1 - centre2, low + high))
    v = (angle1[0] - angle2[0]) ** 2
    weight = _aspect_weight(v, overlap)
    if alpha == 1:
        return torch.addcdiv(torch.addcmul(overlap, v, weight, value=-1), distance2, diagonal2 + EPS, value=-1)
    return _power(overlap, alpha) - _power(distance2 / (diagonal2 + EPS), alpha) - _power(v * weight, alpha)


def eiou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Efficient IoU. See the table above."""
    pair = compare(boxes1_xyxy, boxes2_xyxy)
    value = _power(pair.iou, alpha) - _power(pair.distance2 / pair.diagonal2, alpha)
    for side1, side2, enclosing in zip(pair.size1, pair.size2, pair.enclosing):
        value = value - _power((side2 - side1) ** 2 / (enclosing**2 + EPS), alpha)
    return value


def siou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, *, alpha: float = 1.0) -> Tensor:
    """IoU − (Δ + Ω)/2: distance cost Δ, weighted by the angle of the line between the centres, and shape cost Ω.

    Angle Λ = sin 2φ with φ the angle of that line to the nearer axis; Δ = Σ 1 − exp(−(2 − Λ) ρ_t) with ρ_t = (offset_t / c_t)²;
    Ω = Σ (1 − exp(−|w − w_g| / max(w, w_g)))⁴. Equal centres have Λ = 0 here; the paper leaves them open.
    """
    pair = compare(boxes1_xyxy, boxes2_xyxy)
    angle = 2 * (pair.offset[0] * pair.offset[1]).abs() / (pair.distance2 + EPS)
    distance, shape = torch.zeros_like(angle), torch.zeros_like(angle)
    for offset, enclosing, side1, side2 in zip(pair.offset, pair.enclosing, pair.size1, pair.size2):
        distance = distance + 1 - torch.exp((angle - 2) * offset**2 / (enclosing**2 + EPS))
        difference = (side1 - side2).abs() / (torch.maximum(side1, side2) + EPS)
        shape = shape + (1 - torch.exp(-difference)) ** 4
    return _power(pair.iou, alpha) - _power((distance + shape) / 2, alpha)


def mdpiou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, *, alpha: float = 1.0, image_hw: tuple[float, float] = (640.0, 640.0)) -> Tensor:
    """IoU less the squared distances of the two left top and the two right bottom corners, as fractions of the image's diagonal."""
    value = iou(boxes1_xyxy, boxes2_xyxy, alpha=alpha)
    squared = (boxes2_xyxy - boxes1_xyxy) ** 2 / (image_hw[0] ** 2 + image_hw[1] ** 2)
    return value - _power(squared[..., :2].sum(-1), alpha) - _power(squared[..., 2:].sum(-1), alpha)


def nwd(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, *, constant: float = 12.8) -> Tensor:
    """Normalised Wasserstein distance: boxes as Gaussians, for objects so small that boxes rarely overlap.

    Args:
        boxes1_xyxy: (..., 4) px.
        boxes2_xyxy: (..., 4) px.
        constant: K in px, about the mean object size of the data set; 12.8 is AI-TOD's, the paper's data set.
    """
    pair = compare(boxes1_xyxy, boxes2_xyxy)
    sizes = sum((b - a) ** 2 for a, b in zip(pair.size1, pair.size2)) / 4
    return torch.exp(-torch.sqrt(pair.distance2 + sizes + EPS) / constant)


SIMILARITIES: dict[str, Callable[..., Tensor]] = {
    "IoU": iou,
    "GIoU": giou,
    "DIoU": diou,
    "CIoU": ciou,
    "EIoU": eiou,
    "SIoU": siou,
    "MDPIoU": mdpiou,
}


@torch.no_grad()
def _aspect_weight(v: Tensor, overlap: Tensor) -> Tensor:
    """CIoU's α, a constant for the gradient."""
    return v / (v - overlap + (1 + EPS))


def _squared_norm(vectors: Tensor) -> Tensor:
    """x² + y² (...) of vectors (2, ...)."""
    x, y = (vectors**2).unbind()
    return x + y


def _power(term: Tensor, exponent: float) -> Tensor:
    return term if exponent == 1 else (term + EPS) ** exponent
