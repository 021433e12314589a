"""The loss of anchor-free heads: box overlap, box sides (distribution focal loss, or L1 of plain distances) and class loss on task-aligned
targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.assigners.grid import expected_distances, level_grid
from models.assigners.targets import PaddedTargets, boxes_at, can_count_without_wait, pad_targets
from models.assigners.task_aligned import Assignment, TaskAlignedAssigner
from models.losses.box import BoxLoss
from models.losses.cells import cells_and_background
from models.losses.classification import ClassLoss, check_class_weights
from models.losses.dfl import distribution_focal_loss, relative_side_distance
from utils.boxes import cxcywh_to_xyxy, denormalised
from utils.distributed import all_reduce_sum, world_size
from utils.types import Batch

if TYPE_CHECKING:
    from models.heads.base import HeadOutput
    from utils.config import Hyperparameters


class TaskAlignedLoss:
    """Loss of one or several branches with the same targets.

    Each part is the sum over a branch's cells, divided by the sum of its target scores (at least 1, over all ranks), times gain and
    branch weight; branches are added.

    Args:
        hyp: gains ``box``, ``cls``, ``dfl``; ``iou_loss``; ``cls_loss`` with ``cls_pw``, ``cls_weights``, ``fl_gamma`` and
            ``label_smoothing``; ``tal_topk``, ``tal_alpha`` and ``tal_beta`` of the assigner.
        nc: number of classes.
        strides: px a cell of each level.
        branch_weights: weight of each branch.
        min_candidate_side: see :class:`TaskAlignedAssigner`.
        owners_contain: the same.
        bins: bins of a side's distribution; 1 for plain distances.

    Attributes:
        names: of the parts; the last, with the gain ``dfl``, is ``l1`` for plain distances.
        assigners: one a branch.
    """

    def __init__(
        self,
        hyp: Hyperparameters,
        *,
        nc: int,
        strides: Sequence[float],
        branch_weights: Sequence[float] = (1.0,),
        min_candidate_side: float = 0.0,
        owners_contain: bool = False,
        bins: int = 16,
    ) -> None:
        self.names = ("box", "cls", "dfl" if bins > 1 else "l1")
        self.gains = dict(zip(self.names, (hyp.box, hyp.cls, hyp.dfl)))
        self.box_loss = BoxLoss(hyp.iou_loss)
        check_class_weights(hyp.cls_weights, nc)
        self.class_loss = ClassLoss(hyp.cls_loss, gamma=hyp.fl_gamma, pos_weight=hyp.cls_pw, class_weights=hyp.cls_weights)
        self.smoothing = hyp.label_smoothing
        self.nc, self.bins = nc, bins
        self.strides, self.branch_weights = tuple(strides), tuple(branch_weights)
        self.assigner = TaskAlignedAssigner(
            topk=hyp.tal_topk,
            alpha=hyp.tal_alpha,
            beta=hyp.tal_beta,
            min_candidate_side=min_candidate_side,
            owners_contain=owners_contain,
        )
        self.assigners = (self.assigner,) * len(self.branch_weights)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """The same in all epochs."""

    def __call__(self, output: HeadOutput, batch: Batch) -> dict[str, Tensor]:
        """Scalar parts ``box``, ``cls`` and ``dfl`` or ``l1`` after gains; in float32 also under autocast.

        In distributed training every rank divides by the mean of all ranks' normalisers, so that the mean of the parts over the ranks is
        the part of the whole batch.
        """
        maps = output.main
        with torch.autocast(maps[0].device.type, enabled=False):
            grid = level_grid(maps, self.strides)
            hw_px = (maps[0].shape[2] * self.strides[0], maps[0].shape[3] * self.strides[0])
            targets = pad_targets(batch.targets.to(maps[0].device), batch.max_boxes, batch_size=len(maps[0]), hw_px=hw_px)
            scene = _Scene(targets, _Points(grid.centres, grid.strides), hw_px, self._most_candidates(batch, maps, hw_px))
            totals = torch.zeros(3, device=maps[0].device)
            for weight, assigner, branch in zip(self.branch_weights, self.assigners, output.branches):
                totals = totals + weight * self._branch(branch, scene, assigner)
        return {name: self.gains[name] * total for name, total in zip(self.names, totals)}

    def state_dict(self) -> dict[str, Tensor]:
        """The regression loss's running mean, if it has one."""
        return self.box_loss.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the state of :meth:`state_dict`."""
        self.box_loss.load_state_dict(state)

    def _most_candidates(self, batch: Batch, maps: Sequence[Tensor], hw_px: tuple[float, float]) -> int | None:
        if batch.host_boxes is None or can_count_without_wait(maps[0]):
            return None
        boxes = cxcywh_to_xyxy(denormalised(batch.host_boxes.float(), hw_px))
        return self.assigner.most_candidates(boxes, maps, self.strides)

    def _branch(self, maps: Sequence[Tensor], scene: _Scene, assigner: TaskAlignedAssigner) -> Tensor:
        """Box, class and side loss (3,) of one branch before gains."""
        targets = scene.targets
        maps = [m.float() for m in maps]
        with torch.no_grad():
            sides, logits = zip(*(m.split((4 * self.bins, self.nc), dim=1) for m in maps))
            distances = torch.cat([self._distances(s.flatten(2)) for s in sides], dim=2)  # (B, 4, N)
            boxes = _boxes(distances, scene.grid)
            assigned = assigner(boxes, logits, self.strides, targets, most_candidates=scene.most_candidates)
            normaliser = all_reduce_sum(assigned.score.sum()).clamp(min=1) / world_size()
        weights = self.class_loss.class_weights(maps[0])
        picked, background = cells_and_background(
            maps, assigned.cell, sides=4 * self.bins, gamma=self.class_loss.gamma, class_weights=weights
        )
        sides, logits = picked.split((4 * self.bins, self.nc), dim=1)  # (B, …, R)
        here = _Points(*(t[:, assigned.cell].transpose(0, 1) for t in scene.grid))
        box, side = self._box_losses(sides, here, targets, assigned, scene.hw_px)
        cls = self.class_loss.background_weight * background + self._foreground(logits, targets, assigned)
        return torch.stack((box, cls, side)) / normaliser

    def _box_losses(
        self, sides: Tensor, grid: _Points, targets: PaddedTargets, assigned: Assignment, hw_px: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Regression and side loss of the assigned cells, weighted with their target scores and summed."""
        true = boxes_at(targets.boxes_xyxy, assigned.box)  # (B, R, 4) px
        predicted = _boxes(self._distances(sides), grid)
        box = self.box_loss(predicted, true, mask=assigned.mask, image_hw=hw_px).loss
        low, high = true.transpose(1, 2).split(2, dim=1)  # (B, 2, R)
        distances = torch.cat((grid.centres - low, high - grid.centres), dim=1) / grid.strides  # (B, 4, R)
        if self.bins == 1:
            side = relative_side_distance(sides, distances, strides=grid.strides, image_hw=hw_px)
        else:
            side = distribution_focal_loss(sides.unflatten(1, (4, self.bins)).transpose(2, 3), distances).mean(dim=1)
        return (box * assigned.score).sum(), (side * assigned.score).sum()

    def _foreground(self, logits: Tensor, targets: PaddedTargets, assigned: Assignment) -> Tensor:
        """The difference that the assigned cells' targets make to the class loss of an all-background map.

        Label smoothing moves the fraction ε of a cell's target score from its class to all classes equally (arXiv 1512.00567, section 7).
        """
        label = targets.labels.gather(1, assigned.box)  # (B, R)
        score = torch.zeros_like(logits).scatter_(1, label[:, None], assigned.score[:, None])
        if self.smoothing:
            score = score * (1 - self.smoothing) + assigned.score[:, None] * (self.smoothing / self.nc)
        losses, weights = self.class_loss.over_background(logits, score), self.class_loss.class_weights(logits)
        return (losses if weights is None else losses * weights).sum()

    def _distances(self, sides: Tensor) -> Tensor:
        """Distances (B, 4, K) in strides of side channels (B, 4 · bins, K)."""
        return sides if self.bins == 1 else expected_distances(sides, torch.arange(self.bins, device=sides.device))


class _Points(NamedTuple):
    """Cells by their centres (2, N) or (B, 2, R) and strides (1, N) or (B, 1, R), px."""

    centres: Tensor
    strides: Tensor


class _Scene(NamedTuple):
    """What all branches have in common."""

    targets: PaddedTargets
    grid: _Points
    hw_px: tuple[float, float]
    most_candidates: int | None  # see TaskAlignedAssigner


def _boxes(distances: Tensor, grid: _Points) -> Tensor:
    """Distances (B, 4, K) in strides from K cells' centres to boxes (B, K, 4) xyxy px."""
    left_top, right_bottom = (distances * grid.strides).split(2, dim=1)
    return torch.cat((grid.centres - left_top, grid.centres + right_bottom), dim=1).transpose(1, 2)
