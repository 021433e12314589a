"""Denoising queries: ground truth, disturbed, from which a decoder learns to find the boxes back (DN-DETR, arXiv 2203.01305).

Contrastive as in DINO (arXiv 2203.03605, section 3.3): each group has every box twice, once moved by at most its half side (positive, it
should become the box), once by more (negative, it should become background).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.assigners.targets import PaddedTargets, pad_targets
from utils.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from utils.types import Batch

QUERIES = 100  # denoising queries of an image, positive ones, as far as whole groups allow
LABEL_NOISE = 0.5  # a label is exchanged with half this probability
BOX_NOISE = 1.0  # in half sides


class DenoisingTargets(NamedTuple):
    """The objects of each image, padded to n of one image; boxes are cxcywh in 0-1."""

    labels: Tensor  # (B, n) int64
    boxes: Tensor  # (B, n, 4)
    valid: Tensor  # (B, n) bool


class NoisyObjects(NamedTuple):
    """Disturbed objects as queries, in the order group, positive or negative, object; D = groups · 2 · n."""

    labels: Tensor  # (B, D) int64
    boxes: Tensor  # (B, D, 4) cxcywh in 0-1
    valid: Tensor  # (B, D) bool, False where an image has no such object


def denoising_targets(batch: Batch) -> DenoisingTargets:
    """The objects of a batch, with room for one object at least, so that there are always denoising queries."""
    targets = pad_unit_targets(batch, max(batch.max_boxes, 1))
    return DenoisingTargets(targets.labels, xyxy_to_cxcywh(targets.boxes_xyxy), targets.valid)


def pad_unit_targets(batch: Batch, boxes: int) -> PaddedTargets:
    """The objects of a batch, ``boxes`` an image, with corners in 0-1."""
    targets = batch.targets.to(batch.images.device)
    return pad_targets(targets, boxes, batch_size=len(batch.images), hw_px=(1.0, 1.0))


def group_count(objects: int, queries: int = QUERIES) -> int:
    """How many groups of queries there are for ``objects`` of an image at most."""
    return max(queries // max(objects, 1), 1)


def noisy_objects(targets: DenoisingTargets, *, nc: int, queries: int = QUERIES, label_noise: float = LABEL_NOISE) -> NoisyObjects:
    """Disturbed copies of the objects.

    Args:
        targets: n objects an image.
        nc: number of classes.
        queries: positive queries, as far as whole groups allow.
        label_noise: twice the probability with which a label is exchanged for any.
    """
    groups = group_count(targets.labels.shape[1], queries)
    labels = targets.labels[:, None, None].expand(-1, groups, 2, -1)  # (B, G, 2, n)
    exchanged = torch.rand(labels.shape, device=labels.device) < label_noise * 0.5
    labels = torch.where(exchanged, torch.randint_like(labels, nc), labels)
    valid = targets.valid[:, None, None].expand_as(labels)
    boxes = _moved(targets.boxes[:, None, None].expand(*labels.shape, 4))
    return NoisyObjects(labels.flatten(1), boxes.flatten(1, 3), valid.flatten(1))


def _moved(boxes: Tensor) -> Tensor:
    """Boxes (B, G, 2, n, 4) cxcywh with each side moved: by less than half the box's side, in the second part by half to all of it."""
    half = boxes[..., 2:].repeat(1, 1, 1, 1, 2) * (0.5 * BOX_NOISE)
    share = torch.rand_like(boxes)
    share = torch.stack((share[:, :, 0], share[:, :, 1] + 1), dim=2)
    sign = torch.where(torch.rand_like(boxes) < 0.5, -1.0, 1.0)
    corners = (cxcywh_to_xyxy(boxes) + sign * share * half).clamp(0, 1)
    return xyxy_to_cxcywh(corners)


def visibility(denoising: int, groups: int, matching: int, device: torch.device) -> Tensor:
    """(Q, Q) bool, whether a query (row) sees another (column), Q = denoising + matching queries in this order.

    A matching query sees no denoising one, which holds ground truth; a denoising query sees the matching ones and its own group.
    """
    size = max(denoising // max(groups, 1), 1)
    number = torch.arange(denoising + matching, device=device)
    group = torch.where(number < denoising, number // size, -1)
    return (group[None, :] == -1) | (group[:, None] == group[None, :])
