"""One query for each box, by the cheapest assignment of all (the Hungarian method), as DETR trains (arXiv 2005.12872, section 3.1).

The costs are computed on the device for all images and layers at once; the assignment itself is scipy's, on the host, for which the device
is waited for once a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.assigners.targets import PaddedTargets
from utils.boxes import xyxy_to_cxcywh
from utils.errors import UserError
from utils.iou import giou

CLASS_COST, BOX_COST, GIOU_COST = 2.0, 5.0, 2.0  # RT-DETR, arXiv 2304.08069, and DINO
FOCAL_ALPHA, FOCAL_GAMMA, EPS = 0.25, 2.0, 1e-8


class Matches(NamedTuple):
    """For each of K layers, B images and n places of boxes the query that is theirs."""

    query: Tensor  # (K, B, n) int64, 0 where there is no box
    valid: Tensor  # (K, B, n) bool


def require_scipy() -> Callable[[Any], Any]:
    """scipy's linear_sum_assignment.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("RTDETRDecoder: training matches queries and boxes with the package scipy: pip install scipy") from None
    return linear_sum_assignment


@torch.no_grad()
def match(boxes_xyxy: Tensor, logits: Tensor, targets: PaddedTargets) -> Matches:
    """The cheapest assignment of boxes to queries, every box to one and no query to two; boxes beyond the queries get none.

    Args:
        boxes_xyxy: (K, B, Q, 4) in 0-1.
        logits: (K, B, Q, nc).
        targets: corners in 0-1, n boxes an image.
    """
    assign = require_scipy()
    valid = targets.valid.to(boxes_xyxy.dtype)[:, None].expand(len(logits), -1, -1, -1)
    costs = torch.cat((cost_matrix(boxes_xyxy, logits, targets), valid), dim=2)
    host = costs.cpu().numpy()  # (K, B, Q + 1, n); the one wait for the device
    query, found = np.zeros(host[:, :, 0].shape, dtype=np.int64), np.zeros(host[:, :, 0].shape, dtype=bool)
    for layer, image in np.ndindex(*host.shape[:2]):
        places = np.flatnonzero(host[layer, image, -1])
        rows, columns = assign(host[layer, image, :-1][:, places])
        query[layer, image, places[columns]], found[layer, image, places[columns]] = rows, True
    device = logits.device
    return Matches(torch.from_numpy(query).to(device, non_blocking=True), torch.from_numpy(found).to(device, non_blocking=True))


def cost_matrix(boxes_xyxy: Tensor, logits: Tensor, targets: PaddedTargets) -> Tensor:
    """(K, B, Q, n): the focal loss that the box's class would add, distance of the boxes and 1 - GIoU, weighted; 0 where not finite."""
    p = logits.sigmoid()
    positive = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -(p + EPS).log()
    negative = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -(1 - p + EPS).log()
    index = targets.labels[None, :, None].expand(*logits.shape[:3], -1)
    classes = (positive - negative).gather(3, index)
    wanted = targets.boxes_xyxy.to(boxes_xyxy.dtype)
    apart = torch.cdist(xyxy_to_cxcywh(boxes_xyxy), xyxy_to_cxcywh(wanted).expand(len(logits), -1, -1, -1), p=1)
    overlap = giou(boxes_xyxy[:, :, :, None], wanted[None, :, None])
    costs = CLASS_COST * classes + BOX_COST * apart + GIOU_COST * (1 - overlap)
    return costs.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
