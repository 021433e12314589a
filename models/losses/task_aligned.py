"""The loss of anchor-free heads with box distributions: CIoU, distribution focal loss and class loss on task-aligned targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.assigners.grid import anchor_points, expected_distances
from models.assigners.targets import PaddedTargets, boxes_at, pad_targets
from models.assigners.task_aligned import Assignment, TaskAlignedAssigner
from models.losses.cells import cells_and_background
from models.losses.dfl import distribution_focal_loss
from models.losses.iou import SIMILARITIES
from utils.distributed import all_reduce_sum, world_size
from utils.types import Batch

if TYPE_CHECKING:
    from models.heads.base import HeadOutput
    from utils.config import Hyperparameters


class TaskAlignedLoss:
    """Loss of one or several branches with the same targets.

    Each part is the sum over a branch's cells, divided by the sum of its target scores (at least 1, over all processes), times gain and
    branch weight; branches are added.

    Args:
        hyp: gains ``box``, ``cls``, ``dfl``; ``label_smoothing``; ``iou_loss``; ``tal_topk``, ``tal_alpha``, ``tal_beta``.
        nc: number of classes.
        strides: px a cell of each level.
        branch_weights: weight of each branch.
        min_candidate_side: see :class:`TaskAlignedAssigner`.
        bins: bins of a side's distribution.
    """

    names = ("box", "cls", "dfl")

    def __init__(
        self,
        hyp: Hyperparameters,
        *,
        nc: int,
        strides: Sequence[float],
        branch_weights: Sequence[float] = (1.0,),
        min_candidate_side: float = 0.0,
        bins: int = 16,
    ) -> None:
        self.gains = {"box": hyp.box, "cls": hyp.cls, "dfl": hyp.dfl}
        self.similarity = SIMILARITIES[hyp.iou_loss]
        self.smoothing = hyp.label_smoothing
        self.nc, self.bins = nc, bins
        self.strides, self.branch_weights = tuple(strides), tuple(branch_weights)
        self.assigner = TaskAlignedAssigner(
            topk=hyp.tal_topk, alpha=hyp.tal_alpha, beta=hyp.tal_beta, min_candidate_side=min_candidate_side
        )

    def __call__(self, output: HeadOutput, batch: Batch) -> dict[str, Tensor]:
        """Scalar parts ``box``, ``cls`` and ``dfl`` after gains; in float32 also under autocast.

        With several processes each divides by the mean of the normalisers of all, so that the mean of their parts is the part of the
        whole batch.
        """
        maps = output.main
        with torch.autocast(maps[0].device.type, enabled=False):
            points, strides = anchor_points(maps, self.strides)
            hw_px = (maps[0].shape[2] * self.strides[0], maps[0].shape[3] * self.strides[0])
            targets = pad_targets(batch.targets.to(points.device), batch.max_boxes, batch_size=len(maps[0]), hw_px=hw_px)
            totals = torch.zeros(3, device=points.device)
            for weight, branch in zip(self.branch_weights, output.branches):
                totals = totals + weight * self._branch(branch, points, strides, targets)
        return {name: self.gains[name] * total for name, total in zip(self.names, totals)}

    def _branch(self, maps: Sequence[Tensor], points: Tensor, strides: Tensor, targets: PaddedTargets) -> Tensor:
        """Box, class and distribution loss (3,) of one branch before gains."""
        maps = [m.float() for m in maps]
        with torch.no_grad():
            sides, logits = zip(*(m.split((4 * self.bins, self.nc), dim=1) for m in maps))
            distances = torch.cat([expected_distances(s.flatten(2), self._projection(s)) for s in sides], dim=2)  # (B, 4, N)
            boxes = _boxes(distances * strides, points)
            assigned = self.assigner(boxes, logits, self.strides, targets)
            normaliser = (all_reduce_sum(assigned.score.sum()) / world_size()).clamp(min=1)
        picked, background = cells_and_background(maps, assigned.cell, sides=4 * self.bins)
        sides, logits = picked.split((4 * self.bins, self.nc), dim=1)  # (B, …, R)
        here = _Picks(points[:, assigned.cell].transpose(0, 1), strides[:, assigned.cell].transpose(0, 1))
        box, dfl = self._box_losses(sides, here, targets, assigned)
        return torch.stack((box, background + self._foreground(logits, targets, assigned), dfl)) / normaliser

    def _box_losses(self, sides: Tensor, picks: _Picks, targets: PaddedTargets, assigned: Assignment) -> tuple[Tensor, Tensor]:
        """Regression and distribution loss of the assigned cells, weighted with their target scores and summed."""
        true = boxes_at(targets.boxes_xyxy, assigned.box)  # (B, R, 4) px
        predicted = _boxes(expected_distances(sides, self._projection(sides)) * picks.strides, picks.points)
        box = 1 - self.similarity(predicted, true)
        low, high = true.transpose(1, 2).split(2, dim=1)  # (B, 2, R)
        distances = torch.cat((picks.points - low, high - picks.points), dim=1) / picks.strides  # (B, 4, R)
        dfl = distribution_focal_loss(sides.unflatten(1, (4, self.bins)).transpose(2, 3), distances).mean(dim=1)
        return (box * assigned.score).sum(), (dfl * assigned.score).sum()

    def _foreground(self, logits: Tensor, targets: PaddedTargets, assigned: Assignment) -> Tensor:
        """What the targets of the assigned cells add to the class loss of cells that are all background."""
        label = targets.labels.gather(1, assigned.box)  # (B, R)
        score = torch.zeros_like(logits).scatter_(1, label[:, None], assigned.score[:, None])
        if self.smoothing:
            score = score * (1 - self.smoothing) + assigned.score[:, None] * (self.smoothing / self.nc)
        return -(logits * score).sum()

    def _projection(self, like: Tensor) -> Tensor:
        return torch.arange(self.bins, device=like.device)


class _Picks(NamedTuple):
    points: Tensor  # (B, 2, R) px
    strides: Tensor  # (B, 1, R) px


def _boxes(distances: Tensor, points: Tensor) -> Tensor:
    """Distances (B, 4, K) px from points (2, K) or (B, 2, K) to boxes (B, K, 4) xyxy px."""
    left_top, right_bottom = distances.split(2, dim=1)
    return torch.cat((points - left_top, points + right_bottom), dim=1).transpose(1, 2)
