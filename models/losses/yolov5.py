"""The loss of anchor-based heads: box, objectness and class loss of the places that an assigner picked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.assigners.anchor_ratio import AnchorGrid, Matches, Scene, anchor_grid, assign_by_ratio, decode_places
from models.assigners.targets import PaddedTargets, boxes_at, pad_targets
from models.losses.box import BoxLoss
from models.losses.cells import places_and_plane
from models.losses.classification import ClassLoss, check_class_weights
from utils.distributed import all_reduce_sum, world_size
from utils.types import Batch

if TYPE_CHECKING:
    from models.heads.base import HeadOutput
    from utils.config import Hyperparameters

OBJECTNESS = 4  # index of the objectness among a place's outputs
BALANCES = {3: (4.0, 1.0, 0.4)}  # weights of the levels' objectness losses
OTHER_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)


class Gains(NamedTuple):
    """Weights of the parts."""

    box: float
    obj: float
    cls: float
    seg: float = 0.0  # of masks


class AnchorLoss:
    """Loss of one or several branches of an anchor-based head.

    The objectness target of a place is the overlap of its box with the one it learns, 0 elsewhere. Box and class loss are means over a
    level's matches (over all ranks), the objectness loss is a mean over its places, weighted by level; levels are added.

    Args:
        hyp: ``cls_pw``, ``cls_weights``, ``obj_pw``, ``fl_gamma``, ``cls_loss``, ``label_smoothing``, ``iou_loss``, ``anchor_t``.
        gains: of the three parts for an image of 640 px, before ``obj_by_area``.
        nc: number of classes; with one class there is no class loss.
        strides: px a cell of each level.
        anchors: returns the anchors (levels, anchors a cell, 2) in strides.
        branch_weights: weight of each branch.
        assign: returns the matches; None for YOLOv5's rule in all branches.
        obj_by_area: scales the objectness gain with the image's area / 640².
    """

    names = ("box", "obj", "cls")

    def __init__(
        self,
        hyp: Hyperparameters,
        gains: Gains,
        *,
        nc: int,
        strides: Sequence[float],
        anchors: Callable[[], Tensor],
        branch_weights: Sequence[float] = (1.0,),
        assign: Callable[[Scene], Matches] | None = None,
        obj_by_area: bool = False,
    ) -> None:
        self.gains, self.nc, self.outputs, self.obj_by_area = gains, nc, nc + 5, obj_by_area  # outputs of a place
        self.strides, self.anchors, self.branch_weights = tuple(strides), anchors, tuple(branch_weights)
        self.smoothing = hyp.label_smoothing
        self.assign = assign or partial(assign_by_ratio, anchor_t=hyp.anchor_t)
        self.box_loss = BoxLoss(hyp.iou_loss)
        check_class_weights(hyp.cls_weights, nc)
        self.class_loss = ClassLoss(hyp.cls_loss, gamma=hyp.fl_gamma, pos_weight=hyp.cls_pw, class_weights=hyp.cls_weights)
        self.object_loss = ClassLoss(gamma=hyp.fl_gamma, pos_weight=hyp.obj_pw)
        self.balance = BALANCES.get(len(self.strides), OTHER_BALANCE)

    def __call__(self, output: HeadOutput, batch: Batch) -> dict[str, Tensor]:
        """Scalar parts ``box``, ``obj`` and ``cls`` after gains; in float32 also under autocast."""
        main = [m.float() for m in output.main]
        with torch.autocast(main[0].device.type, enabled=False):
            hw_px = (main[0].shape[2] * self.strides[0], main[0].shape[3] * self.strides[0])
            anchors = self.anchors().to(main[0].device)
            grid = anchor_grid(main, anchors, self.strides)
            targets = pad_targets(batch.targets.to(main[0].device), batch.max_boxes, batch_size=len(main[0]), hw_px=hw_px)
            total = torch.zeros(len(self.names), device=main[0].device)
            images = max(batch.images_of_step, 1) / world_size()
            further = self._further(output, batch, grid, hw_px, images)
            for number, (weight, maps) in enumerate(zip(self.branch_weights, output.branches)):
                auxiliary = number < len(output.branches) - 1
                scene = Scene([m.detach() for m in main], grid, anchors, self.strides, targets, auxiliary)
                matches = self.assign(scene).compact()
                branch = self._branch([m.float() for m in maps], grid, targets, matches, hw_px, images, further)
                total = total + weight * branch
            area = hw_px[0] * hw_px[1] / 640**2 if self.obj_by_area else 1.0
        gains = self.gains._replace(obj=self.gains.obj * area)
        return {name: getattr(gains, name) * part for name, part in zip(self.names, total)}

    def _further(
        self, output: HeadOutput, batch: Batch, grid: AnchorGrid, hw_px: tuple[float, float], images: float
    ) -> Callable[[Tensor, Matches], Sequence[Tensor]]:
        """What a task adds: from the picked places (B, outputs, R) and what they are, further parts before gains."""
        return lambda picked, matches: ()

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """The same in all epochs."""

    def compile(self, *, backend: str) -> str:
        """Compiles nothing, and returns why."""
        return "that of heads with anchors has lists whose lengths follow the boxes"

    def state_dict(self) -> dict[str, Tensor]:
        """The regression loss's running mean, if it has one."""
        return self.box_loss.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the state of :meth:`state_dict`."""
        self.box_loss.load_state_dict(state)

    def _branch(
        self,
        maps: Sequence[Tensor],
        grid: AnchorGrid,
        targets: PaddedTargets,
        matches: Matches,
        hw_px: tuple[float, float],
        images: float,
        further: Callable[[Tensor, Matches], Sequence[Tensor]],
    ) -> Tensor:
        """The parts (P,) of one branch before gains; ``images`` is the mean batch size over the ranks."""
        picked, objectness = places_and_plane(maps, matches.place, outputs=self.outputs, channel=OBJECTNESS)  # (B, outputs, R), (B, A)
        predicted = decode_places(picked[:, :4], grid, matches.place)
        fit = self.box_loss(predicted, boxes_at(targets.boxes_xyxy, matches.box), mask=matches.mask, image_hw=hw_px)
        per_match = self._mean_weights(grid, matches)  # (B, R)
        box = (fit.loss * per_match).sum()
        target = _at_places(fit.similarity.detach().clamp(min=0), matches, len(grid.level))
        per_place = self._place_weights(grid, images)
        obj = (self.object_loss(objectness, target) * per_place).sum()
        cls = torch.zeros_like(obj)
        if self.nc > 1:
            losses = self.class_loss(picked[:, 5 : 5 + self.nc], self._class_targets(targets.labels.gather(1, matches.box)))
            weights = self.class_loss.class_weights(losses)
            cls = ((losses if weights is None else losses * weights).mean(dim=1) * per_match).sum()
        return torch.stack((box, obj, cls, *further(picked, matches)))

    def _mean_weights(self, grid: AnchorGrid, matches: Matches) -> Tensor:
        """Weights (B, R) that make a sum over matches the sum of each level's mean."""
        level = grid.level[matches.place]
        counts = matches.mask.new_zeros(len(self.strides), dtype=torch.float32)
        counts = counts.scatter_add_(0, level.flatten(), matches.mask.float().flatten())
        counts = all_reduce_sum(counts).clamp(min=1) / world_size()
        return matches.mask / counts[level]

    def _place_weights(self, grid: AnchorGrid, images: float) -> Tensor:
        """Weights (A,) that make a sum over places the balanced sum of each level's mean."""
        per_cell = len(grid.level) // sum(h * w for h, w in grid.sizes)
        counts = [per_cell * h * w for h, w in grid.sizes]
        weights = [balance / (images * count) for balance, count in zip(self.balance, counts)]
        return torch.cat([torch.full((count,), weight, device=grid.level.device) for weight, count in zip(weights, counts)])

    def _class_targets(self, labels: Tensor) -> Tensor:
        """Labels (B, R) to targets (B, nc, R): 1 − ε/2 for the class and ε/2 for the others with label smoothing ε."""
        classes = torch.arange(self.nc, device=labels.device)[:, None]
        return torch.where(labels[:, None] == classes, 1 - self.smoothing / 2, self.smoothing / 2)


def _at_places(values: Tensor, matches: Matches, places: int) -> Tensor:
    """Values (B, R) of matches written to their places (B, A), 0 elsewhere; of several at one place the last one is used."""
    order = torch.arange(values.shape[1], device=values.device).expand_as(values)
    order = torch.where(matches.mask, order, -1)
    last = order.new_full((len(values), places), -1).scatter_reduce_(1, matches.place, order, "amax")
    if values.shape[1] == 0:
        return values.new_zeros(len(values), places)
    return torch.where(last >= 0, values.gather(1, last.clamp(min=0)), 0.0)
