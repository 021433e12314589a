"""The loss of anchor-free heads: box overlap, box sides (distribution focal loss, or L1 of plain distances) and class loss on task-aligned
targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.assigners.grid import LevelGrid, RowOrder, expected_distances_of_rows, level_grid, row_order
from models.assigners.targets import PaddedTargets, boxes_at, bucket, can_count_without_wait, pad_targets
from models.assigners.task_aligned import Assignment, Predicted, TaskAlignedAssigner
from models.losses.box import BoxLoss
from models.losses.cells import Tables, as_tables, cells_and_background
from models.losses.classification import ClassLoss, check_class_weights
from models.losses.dfl import distribution_focal_loss, relative_side_distance
from models.losses.terms import Assigned, BatchOfBranches, LossTerm
from utils.boxes import cxcywh_to_xyxy, denormalised
from utils.distributed import all_reduce_sum, world_size
from utils.iou import ciou_terms
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
        terms: what a task adds.

    Attributes:
        names: of the parts; the third, with the gain ``dfl``, is ``l1`` for plain distances; those of ``terms`` follow.
        assigners: one for all branches, or one a branch.
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
        terms: Sequence[LossTerm] = (),
    ) -> None:
        self.terms = tuple(terms)
        self.names = ("box", "cls", "dfl" if bins > 1 else "l1", *(name for term in terms for name in term.names))
        self._gains = (hyp.box, hyp.cls, hyp.dfl, *(gain for term in terms for gain in term.gains))
        self.set_branch_weights(branch_weights)
        self.box_loss = BoxLoss(hyp.iou_loss)
        check_class_weights(hyp.cls_weights, nc)
        self.class_loss = ClassLoss(hyp.cls_loss, gamma=hyp.fl_gamma, pos_weight=hyp.cls_pw, class_weights=hyp.cls_weights)
        self.smoothing = hyp.label_smoothing
        self.nc, self.bins = nc, bins
        self._compiled: Callable[..., tuple[Tensor, Tensor]] | None = None
        self.strides = tuple(strides)
        self.assigner = TaskAlignedAssigner(
            topk=hyp.tal_topk,
            alpha=hyp.tal_alpha,
            beta=hyp.tal_beta,
            min_candidate_side=min_candidate_side,
            owners_contain=owners_contain,
        )
        self.assigners: tuple[TaskAlignedAssigner, ...] = (self.assigner,)

    def set_branch_weights(self, weights: Sequence[float]) -> None:
        """Sets the weight of each branch."""
        self.branch_weights = tuple(weights)
        self._factors = torch.tensor([(gain,) for gain in self._gains]) * torch.tensor(self.branch_weights)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """The same in all epochs."""

    def __call__(self, output: HeadOutput, batch: Batch) -> dict[str, Tensor]:
        """Scalar parts ``box``, ``cls`` and ``dfl`` or ``l1`` and those of the terms after gains; in float32 also under autocast.

        In distributed training every rank divides by the mean of all ranks' normalisers, so that the mean of the parts over the ranks is
        the part of the whole batch.
        """
        device = output.main[0].device
        with torch.autocast(device.type, enabled=False):
            compiled = self._compiled if torch.is_grad_enabled() else None  # validation has batches of many sizes
            step = len(output.branches) if len(self.assigners) == 1 else 1
            scene = self._scene(output, batch, branches=step, fixed_sizes=compiled is not None)
            found = []
            for first, assigner in zip(range(0, len(output.branches), step), self.assigners):
                further = self._further(output, batch, scene, range(first, first + step)) if self.terms else None
                found.append((compiled or self._sums)(output.branches[first : first + step], scene, assigner, further))
            sums, scores = (torch.cat(parts, dim=-1) for parts in zip(*found)) if len(found) > 1 else found[0]
            normaliser = all_reduce_sum(scores).clamp(min=1) / world_size()
            totals = (sums * (self._factors_on(device) / normaliser)).sum(dim=1)
        return dict(zip(self.names, totals.unbind()))

    def compile(self, *, backend: str) -> str:
        """Compiles assigner and loss for training, one graph for each size of the maps and each :func:`bucket` of boxes.

        Returns:
            Why it cannot, empty where it can. The compiler itself is called with the first batch, and raises there.
        """
        if self.terms:
            return f"the parts {', '.join(self.names[3:])} have sizes that depend on the objects"
        if self.box_loss.keeps_state:
            return f"iou_loss {self.box_loss.name} keeps a mean from step to step"
        self._compiled = torch.compile(self._sums, backend=backend, dynamic=False)
        return ""

    def state_dict(self) -> dict[str, Tensor]:
        """The regression loss's running mean, if it has one."""
        return self.box_loss.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the state of :meth:`state_dict`."""
        self.box_loss.load_state_dict(state)

    def _scene(self, output: HeadOutput, batch: Batch, *, branches: int, fixed_sizes: bool) -> Scene:
        maps = output.main
        boxes = bucket(batch.max_boxes) if fixed_sizes else batch.max_boxes
        hw_px = (maps[0].shape[2] * self.strides[0], maps[0].shape[3] * self.strides[0])
        targets = pad_targets(batch.targets.to(maps[0].device), boxes, batch_size=len(maps[0]), hw_px=hw_px)
        order = row_order(maps, self.strides, branches=branches)
        most = None if fixed_sizes else self._most_candidates(batch, maps, hw_px)
        return Scene(targets, level_grid(maps, self.strides), order, hw_px, most)

    def _most_candidates(self, batch: Batch, maps: Sequence[Tensor], hw_px: tuple[float, float]) -> int | None:
        if batch.host_boxes is None or can_count_without_wait(maps[0]):
            return None
        boxes = cxcywh_to_xyxy(denormalised(batch.host_boxes.float(), hw_px))
        return self.assigner.most_candidates(boxes, maps, self.strides)

    def _further(self, output: HeadOutput, batch: Batch, scene: Scene, branches: range) -> BatchOfBranches:
        """What the terms read of some of the branches."""
        fields = output.fields[branches.start : branches.stop]
        targets = batch.targets.to(output.main[0].device)
        return BatchOfBranches(fields, output.shared, branches.start, batch, targets, scene.targets, scene.grid, scene.hw_px)

    def _sums(
        self, branches: Sequence[Sequence[Tensor]], scene: Scene, assigner: TaskAlignedAssigner, further: BatchOfBranches | None = None
    ) -> tuple[Tensor, Tensor]:
        """Box, class and side loss (3, K) of K branches before gains, and the sums (K,) of their target scores.

        With what the terms read, their parts follow: sums and what they are divided by, both (3 + P, K).
        """
        bins = torch.arange(self.bins, device=branches[0][0].device, dtype=torch.float32)
        tables = as_tables(branches, sides=4 * self.bins)
        assigned = assigner.assign(self._predicted(tables, bins, scene, branches=len(branches), further=further), scene.targets)
        row, by_branch = assigned.row.flatten(), (len(branches), assigned.row.numel() // len(branches))
        weights = self.class_loss.class_weights(tables.logits)
        sides, logits, background = cells_and_background(
            branches, tables, row, gamma=self.class_loss.gamma, class_weights=None if weights is None else weights.squeeze(1)
        )
        boxes = self._box_losses(sides.unflatten(1, (4, self.bins)), bins, scene, assigned, further)
        cls = self._foreground(logits, scene.targets, assigned)
        box, side, cls = (part.view(by_branch).sum(dim=1) for part in (boxes.overlap, boxes.side, cls))
        if self.class_loss.background_weight != 1:
            background = background * self.class_loss.background_weight
        sums, scores = torch.stack((box, background + cls, side)), assigned.score.view(by_branch).sum(dim=1)
        if further is None:
            return sums, scores
        parts = [term(further, self._assigned(boxes, assigned, scene)) for term in self.terms]
        own = scores.expand(len(sums), -1)
        return torch.cat((sums, *(part for part, _ in parts))), torch.cat((own, *(divisor for _, divisor in parts)))

    def _assigned(self, boxes: BoxLosses, assigned: Assignment, scene: Scene) -> Assigned:
        (batch, n), cells, shape = scene.targets.valid.shape, scene.grid.centres.shape[1], assigned.box.shape
        image = torch.arange(len(assigned.box), device=assigned.box.device)[:, None]  # (K · B, 1)
        place, number = image * cells + assigned.cell, image % batch * n + assigned.box
        return Assigned(assigned, place, number, boxes.predicted_xyxy.view(*shape, 4), boxes.true_xyxy.view(*shape, 4))

    @torch.no_grad()
    def _predicted(self, tables: Tables, bins: Tensor, scene: Scene, *, branches: int, further: BatchOfBranches | None = None) -> Predicted:
        distances = self._distances(tables.sides.unflatten(1, (4, self.bins)), bins)
        boxes_xyxy = torch.addcmul(scene.order.centre, scene.order.reach, distances)  # (T, 4)
        boxes_xyxy = boxes_xyxy.index_select(0, scene.order.row)
        terms = ciou_terms(boxes_xyxy).unflatten(1, (branches, -1))
        predicted = Predicted(terms, tables.logits, scene.order.row, scene.grid, scene.most_candidates)
        if further is None:
            return predicted
        in_place = boxes_xyxy.view(branches, len(scene.targets.valid), -1, 4)
        measures = (term.overlap_measure(further, in_place) for term in self.terms)
        return predicted._replace(measure=next((measure for measure in measures if measure is not None), None))

    def _distances(self, sides: Tensor, bins: Tensor) -> Tensor:
        """Distances (R, 4) in strides of side channels (R, 4, bins)."""
        return sides.squeeze(2) if self.bins == 1 else expected_distances_of_rows(sides, bins)

    def _box_losses(self, sides: Tensor, bins: Tensor, scene: Scene, assigned: Assignment, further: BatchOfBranches | None) -> BoxLosses:
        """Regression and side loss (R,) of the assigned cells, weighted with their target scores.

        Args:
            sides: (R, 4, bins) of the cells of all branches.
            bins: (bins,) values.
            scene: the batch.
            assigned: R cells in all.
            further: what a task adds to the cells.
        """
        row, score = assigned.row.flatten(), assigned.score.flatten()
        boxes_xyxy = scene.targets.boxes_xyxy
        true = boxes_at(boxes_xyxy.repeat(len(assigned.box) // len(boxes_xyxy), 1, 1), assigned.box).flatten(0, 1)  # (R, 4) px
        centre, reach = scene.order.centre[row], scene.order.reach[row]
        distances, wanted = self._distances(sides, bins), (true - centre) / reach
        predicted = torch.addcmul(centre, reach, distances)
        parts = len(row) // (assigned.row.shape[1] * len(boxes_xyxy)) if self.box_loss.keeps_state and len(row) else 1
        pairs = (t.chunk(parts) for t in (predicted, true, assigned.mask.flatten()))
        box = torch.cat([self.box_loss(p, t, mask=mask, image_hw=scene.hw_px).loss for p, t, mask in zip(*pairs)])
        if self.bins == 1:
            side = relative_side_distance(distances, wanted, strides=reach.abs(), image_hw=scene.hw_px)
        else:
            side = distribution_focal_loss(sides, wanted).mean(dim=1)
        return BoxLosses(box * score, side * score, predicted, true)

    def _foreground(self, logits: Tensor, targets: PaddedTargets, assigned: Assignment) -> Tensor:
        """The difference (R, nc) that the assigned cells' targets make to the class loss of an all-background map.

        Label smoothing moves the fraction ε of a cell's target score from its class to all classes equally (arXiv 1512.00567, section 7).
        """
        labels = targets.labels
        label = labels.repeat(len(assigned.box) // len(labels), 1).gather(1, assigned.box).view(-1, 1)  # (R, 1)
        target = assigned.score.view(-1, 1)
        score = torch.zeros_like(logits).scatter_(1, label, target)
        if self.smoothing:
            score = score * (1 - self.smoothing) + target * (self.smoothing / self.nc)
        losses, weights = self.class_loss.over_background(logits, score), self.class_loss.class_weights(logits)
        return (losses if weights is None else losses * weights.squeeze(1)).sum(dim=1)

    def _factors_on(self, device: torch.device) -> Tensor:
        """Gains times weights of the branches (3, K) on a device, where they stay."""
        if self._factors.device != device:
            self._factors = self._factors.to(device, non_blocking=True)
        return self._factors


class BoxLosses(NamedTuple):
    """Of R assigned cells."""

    overlap: Tensor  # (R,) regression loss, weighted
    side: Tensor  # (R,) side loss, weighted
    predicted_xyxy: Tensor  # (R, 4) px, with gradient
    true_xyxy: Tensor  # (R, 4) px


class Scene(NamedTuple):
    """What all branches have in common."""

    targets: PaddedTargets
    grid: LevelGrid
    order: RowOrder
    hw_px: tuple[float, float]
    most_candidates: int | None  # see TaskAlignedAssigner
