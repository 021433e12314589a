"""The loss of heads of rotated boxes: ProbIoU (arXiv 2106.06072) in place of the box overlap, in the loss as in the assignment, distances
along the sides of the turned box, and a loss of the angle itself.

A cell predicts the distances to the four sides in the frame of the box: its centre lies ((r − l)/2, (b − t)/2) from the cell, turned by the
angle. Candidates of a box are the cells whose centres are inside the turned box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.assigners.targets import can_count_without_wait
from models.assigners.task_aligned import Assignment
from models.losses.dfl import distribution_focal_loss, relative_side_distance
from models.losses.end_to_end import EndToEndLoss
from models.losses.task_aligned import BoxLosses, Scene, TaskAlignedLoss
from models.losses.terms import Assigned, BatchOfBranches, LossTerm
from utils.boxes import denormalised, xyxy_to_cxcywh
from utils.errors import UserError
from utils.rotated.boxes import extents
from utils.rotated.probiou import LOSS_FLOOR, gaussian_terms, probiou, probiou_of_terms
from utils.types import Batch

if TYPE_CHECKING:
    from models.heads.base import HeadOutput
    from utils.config import Hyperparameters

ANGLE = "angle"  # name of the field
LEAST_SIDE = 2.0  # px; targets with a shorter side are not learned
ASPECT_SCALE = 3.0  # the angle of a box counts exp(−(log(w/h)/3)²): most of all that of a nearly square one, which ProbIoU hardly sees


def radians(raw: Tensor, *, plain: bool) -> Tensor:
    """Angles of raw channels: (σ − 1/4)π, in [−π/4, 3π/4), of YOLOv8 and YOLO11; the value itself of YOLO26."""
    return raw if plain else (raw.sigmoid() - 0.25) * math.pi


def turned_centre(offset: Tensor, angle: Tensor) -> Tensor:
    """Offsets (…, 2) px, turned by angles (…, 1)."""
    x, y = offset.split(1, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((x * cos - y * sin, x * sin + y * cos), dim=-1)


def boxes_of_distances(distances: Tensor, angle: Tensor, centres: Tensor) -> Tensor:
    """Rotated boxes (…, 5) px of cells.

    Args:
        distances: (…, 4) px to left, top, right and bottom along the sides of the turned box.
        angle: (…, 1) radians.
        centres: (…, 2) px of the cells.
    """
    low, high = distances.split(2, dim=-1)
    return torch.cat((centres + turned_centre((high - low) / 2, angle), low + high, angle), dim=-1)


def distances_of_boxes(boxes_cxcywha: Tensor, centres: Tensor) -> Tensor:
    """The inverse of :func:`boxes_of_distances`: (…, 4) px from cells to the sides of boxes (…, 5)."""
    centre, size, angle = boxes_cxcywha.split((2, 2, 1), dim=-1)
    offset = turned_centre(centre - centres, -angle)
    return torch.cat((size / 2 - offset, size / 2 + offset), dim=-1)


class RotatedOverlap:
    """ProbIoU of predicted boxes with the boxes that contain their cells' centres, else 0; for the assignment.

    Args:
        boxes_cxcywha: (K · B · N, 5) predicted, branch by branch, image by image.
        true_cxcywha: (B · n, 5).
        centres: (2, N) px of the cells.
        least_side: px; a shorter side counts as so long where cells inside are looked for.
    """

    def __init__(self, boxes_cxcywha: Tensor, true_cxcywha: Tensor, *, centres: Tensor, least_side: float) -> None:
        self.predicted, self.true, self.centres = gaussian_terms(boxes_cxcywha), gaussian_terms(true_cxcywha), centres
        angle, half = true_cxcywha[:, 4], true_cxcywha[:, 2:4].clamp(min=least_side).T / 2
        self.frame = torch.cat((true_cxcywha[:, :2].T, half, angle.cos()[None], angle.sin()[None]))  # (6, B · n)

    def __call__(self, overlap: Tensor, *, place: Tensor, number: Tensor) -> Tensor:
        value = probiou_of_terms(self.predicted[:, place], self.true[:, number]).clamp(min=0)
        x, y, half_w, half_h, cos, sin = self.frame[:, number].unbind()
        cell_x, cell_y = self.centres[:, place % self.centres.shape[1]].unbind()
        dx, dy = cell_x - x, cell_y - y
        inside = ((dx * cos + dy * sin).abs() <= half_w) & ((dy * cos - dx * sin).abs() <= half_h)
        return value * inside


class AngleTerm(LossTerm):
    """sin²(2Δ) exp(−(log(w/h)/3)²) of the angle difference Δ, weighted with the target scores; a quarter turn is no difference.

    Args:
        gain: of the part.
        plain: whether the raw channel is the angle itself.
        least_side: see :class:`RotatedOverlap`.
    """

    names = (ANGLE,)

    def __init__(self, gain: float, *, plain: bool, least_side: float) -> None:
        self.gains = (gain,)
        self.plain, self.least_side = plain, least_side

    def overlap_measure(self, predicted: BatchOfBranches, boxes_xyxy: Tensor) -> RotatedOverlap:
        angle = radians(predicted.field(ANGLE), plain=self.plain)  # (K · B · N, 1)
        centres, rotated = predicted.grid.centres, rotated_targets(predicted)
        offset = xyxy_to_cxcywh(boxes_xyxy) - torch.nn.functional.pad(centres.T, (0, 2))  # (K, B, N, 4), the centre from the cell
        turned = turned_centre(offset[..., :2].flatten(0, 2), angle).view_as(offset[..., :2]) + centres.T
        boxes = torch.cat((turned, offset[..., 2:]), dim=-1).flatten(0, 2)
        return RotatedOverlap(torch.cat((boxes, angle), dim=1), rotated.flatten(0, 1), centres=centres, least_side=self.least_side)

    def __call__(self, predicted: BatchOfBranches, assigned: Assigned) -> tuple[Tensor, Tensor]:
        by_branch = (len(predicted.fields), -1)
        true = rotated_targets(predicted).flatten(0, 1)[assigned.number]  # (K · B, R, 5)
        angle = radians(predicted.field(ANGLE)[assigned.place], plain=self.plain).squeeze(-1)
        w, h = true[..., 2].clamp(min=1e-3), true[..., 3].clamp(min=1e-3)
        weight = torch.exp(-((torch.log(w / h) / ASPECT_SCALE) ** 2)) * assigned.picks.score
        loss = torch.sin(2 * (angle - true[..., 4])) ** 2 * weight
        sums, scores = (part.reshape(by_branch).sum(dim=1)[None] for part in (loss, assigned.picks.score))
        return sums, scores


def rotated_targets(predicted: BatchOfBranches) -> Tensor:
    """The boxes (B, n, 5) of a batch. Raises TypeError where its targets have no angle."""
    if predicted.padded.rotated is None:
        raise TypeError("targets of rotated boxes have an angle; these come from another task's labels")
    return predicted.padded.rotated


class RotatedLoss(TaskAlignedLoss):
    """:class:`TaskAlignedLoss` of rotated boxes; the part ``angle`` follows the others.

    Args:
        hyp: as there.
        plain_angle: whether the raw channel is the angle itself.
        options: as there; :class:`AngleTerm` is among the terms.

    Raises:
        UserError: ``iou_loss`` asks for a loss of axis-aligned boxes.
    """

    def __init__(self, hyp: Hyperparameters, *, plain_angle: bool, **options: Any) -> None:
        if hyp.iou_loss != "CIoU":
            raise UserError(
                f"{hyp.source or 'hyper-parameters'}: iou_loss {hyp.iou_loss}: rotated boxes are compared by ProbIoU; leave it out"
            )
        super().__init__(hyp, **options)
        self.plain_angle = plain_angle

    def _scene(self, output: HeadOutput, batch: Batch, *, branches: int, fixed_sizes: bool) -> Scene:
        """The boxes of the scene are the axis-aligned ones that hold all candidates of the rotated boxes."""
        scene = super()._scene(output, batch, branches=branches, fixed_sizes=fixed_sizes)
        targets = scene.targets
        if targets.rotated is None:
            raise TypeError("targets of rotated boxes have an angle; these come from another task's labels")
        centre, size, angle = targets.rotated.split((2, 2, 1), dim=-1)
        searched = torch.cat((centre, size.clamp(min=self.assigner.min_candidate_side), angle), dim=-1)
        valid = targets.valid & (size.amin(dim=-1) >= LEAST_SIDE)
        return scene._replace(targets=targets._replace(boxes_xyxy=extents(searched) * valid[..., None], valid=valid))

    def _most_candidates(self, batch: Batch, maps: Sequence[Tensor], hw_px: tuple[float, float]) -> int | None:
        """A bound for any angle: that of squares as large as the diagonals."""
        if batch.host_boxes is None or can_count_without_wait(maps[0]):
            return None
        boxes = denormalised(batch.host_boxes.float(), hw_px)
        half = boxes[:, 2:].clamp(min=self.assigner.min_candidate_side).norm(dim=1, keepdim=True) / 2
        return self.assigner.most_candidates(torch.cat((boxes[:, :2] - half, boxes[:, :2] + half), dim=1), maps, self.strides)

    def _box_losses(self, sides: Tensor, bins: Tensor, scene: Scene, assigned: Assignment, further: BatchOfBranches | None) -> BoxLosses:
        assert further is not None
        image = torch.arange(len(assigned.box), device=assigned.box.device)[:, None]
        batch, n = scene.targets.valid.shape
        place, number = image * scene.grid.centres.shape[1] + assigned.cell, image % batch * n + assigned.box
        true = rotated_targets(further).flatten(0, 1)[number.flatten()]  # (R, 5)
        angle = radians(further.field(ANGLE)[place.flatten()], plain=self.plain_angle)
        row, score = assigned.row.flatten(), assigned.score.flatten()
        centre, stride = scene.order.centre[row, :2], scene.order.reach[row].abs()
        distances, wanted = self._distances(sides, bins), distances_of_boxes(true, centre) / stride
        predicted = boxes_of_distances(distances * stride, angle, centre)
        cells = torch.cat((stride, torch.ones_like(angle)), dim=1)  # the floor is in cells, whatever their size
        overlap = 1 - probiou(predicted / cells, true / cells, floor=LOSS_FLOOR)
        if self.bins == 1:
            side = relative_side_distance(distances, wanted, strides=stride, image_hw=scene.hw_px)
        else:
            side = distribution_focal_loss(sides, wanted).mean(dim=1)
        return BoxLosses(overlap * score, side * score, extents(predicted), extents(true))


class EndToEndRotatedLoss(RotatedLoss, EndToEndLoss):
    """:class:`RotatedLoss` with an assignment of its own for each branch, see :class:`EndToEndLoss`."""
