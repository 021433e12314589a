"""What segmentation adds to the loss of anchor-free heads: the masks of the assigned cells, and for YOLO26 a map of the classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.assigners.targets import can_count_without_wait
from models.assigners.task_aligned import OverlapMeasure
from models.losses.cells import cells_at
from models.losses.mask_overlap import MaskOverlap
from models.losses.mask_pixels import Grid, Rectangles, chunks, grouped
from models.losses.masks import Learned, cells_of_map, mask_loss
from models.losses.terms import Assigned, BatchOfBranches, LossTerm
from utils.boxes import cxcywh_to_xyxy, denormalised
from utils.errors import UserError
from utils.types import Targets

COEFFICIENTS, PROTOTYPES, SEMANTIC = "coefficients", "prototypes", "semantic"
DICE_SMOOTHING = 1.0
SLICE_CELLS = 1 << 22  # cells of masks that are unpacked at once
NO_MASKS = "segmentation needs the masks of the objects, and this batch has none; the data set's labels should be polygons"


class MaskTerm(LossTerm):
    """The mean of the mask losses of a branch's assigned cells, which count alike whatever their target score.

    Args:
        gain: factor.
        prototypes: name of each branch's prototypes among the shared maps; one for all branches.
        first_trains: whether only the first branch trains the prototypes (YOLO26).
        by_masks: whether the assignment's overlap is the mean of that of the boxes and that of the masks (YOLO26).
    """

    names = ("seg",)

    def __init__(
        self, gain: float, *, prototypes: Sequence[str] = (PROTOTYPES,), first_trains: bool = False, by_masks: bool = False
    ) -> None:
        self.gains = (gain,)
        self.prototypes, self.first_trains, self.by_masks = tuple(prototypes), first_trains, by_masks

    def overlap_measure(self, predicted: BatchOfBranches, boxes_xyxy: Tensor) -> OverlapMeasure | None:
        if not self.by_masks:
            return None
        maps = [self._prototypes(predicted, branch).detach() for branch in range(len(predicted.fields))]
        with torch.no_grad():
            coefficients = predicted.field(COEFFICIENTS)
        return MaskOverlap(coefficients, torch.stack(maps), boxes_xyxy, grid_of(predicted, maps[0]), predicted.target_row())

    def __call__(self, predicted: BatchOfBranches, assigned: Assigned) -> tuple[Tensor, Tensor]:
        """Sums (1, K), and the numbers of assigned cells (1, K)."""
        branches, batch = len(predicted.fields), len(predicted.padded.valid)
        mask, row, number = (t.unflatten(0, (branches, batch)) for t in (assigned.picks.mask, assigned.picks.row, assigned.number))
        target = predicted.target_row().flatten()[number]  # (K, B, R)
        image = torch.arange(batch, device=mask.device)[:, None].expand_as(mask[0])
        cells, boxes, sums = batch * predicted.grid.centres.shape[1], target_boxes_px(predicted.targets, predicted.hw_px), []
        for branch in range(branches):
            prototypes = self._prototypes(predicted, branch)
            learned = Learned(image.flatten(), target[branch].flatten(), mask[branch].flatten().float())
            places = row[branch].flatten() - branch * cells
            if can_count_without_wait(mask):
                counted = learned.weight.nonzero().squeeze(1)
                learned, places = Learned(*(t[counted] for t in learned)), places[counted]
            coefficients = cells_at([predicted.fields[branch][COEFFICIENTS]], places)
            sums.append(mask_loss(coefficients, prototypes, learned, boxes, grid_of(predicted, prototypes)))
        return torch.stack(sums)[None], mask.sum(dim=(1, 2))[None].float()

    def _prototypes(self, predicted: BatchOfBranches, branch: int) -> Tensor:
        number = predicted.first + branch
        maps = predicted.shared[self.prototypes[number % len(self.prototypes)]]
        return maps.detach() if self.first_trains and number > 0 else maps


class SemanticTerm(LossTerm):
    """Half the binary cross entropy and half the Dice loss (arXiv 1606.04797) of a map of the classes, as published with YOLO26.

    The map is part of the prototypes' module in training only. A cell's class is that of the object whose mask covers it, the last of
    several; cells that no mask covers have none. It counts in the batches in which a cell was assigned. Its gradient is that of the first
    branch, since the others do not train the layers before the head.
    """

    names = ("sem",)

    def __init__(self, gain: float) -> None:
        self.gains = (gain,)

    def __call__(self, predicted: BatchOfBranches, assigned: Assigned) -> tuple[Tensor, Tensor]:
        """The mean of the batch for each branch (1, K), divided by 1."""
        one = torch.ones(1, len(predicted.fields), device=assigned.place.device)
        logits = predicted.shared.get(SEMANTIC)
        if logits is None:
            return one * 0, one
        logits = logits.float() if predicted.first == 0 else logits.float().detach()
        label = covering_class(predicted.targets, grid_of(predicted, logits), batch=len(logits))
        loss = semantic_loss(logits, label)
        return one * loss * assigned.picks.mask.any(), one


def semantic_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Half the mean binary cross entropy and half the mean Dice loss of logits (B, nc, h, w) and classes (B, h, w), -1 for none."""
    batch, nc = logits.shape[:2]
    logits, label = logits.flatten(2), label.flatten(1)[:, None]  # (B, nc, h · w), (B, 1, h · w)
    covered, index = label >= 0, label.clamp(min=0)
    of_label = logits.gather(1, index) * covered
    entropy = (F.softplus(logits).sum() - of_label.sum()) / logits.numel()
    scores = logits.sigmoid()
    zeros = logits.new_zeros(batch, nc)
    shared = zeros.scatter_add(1, index[:, 0], (scores.gather(1, index) * covered)[:, 0])
    counts = zeros.scatter_add(1, index[:, 0], covered[:, 0].to(logits.dtype))
    dice = (2 * shared + DICE_SMOOTHING) / (scores.sum(dim=2) + counts + DICE_SMOOTHING)
    return (entropy + (1 - dice).mean()) / 2


def covering_class(targets: Targets, grid: Grid, *, batch: int) -> Tensor:
    """The class (B, h, w) int64 of the last object whose mask covers a cell of the map, -1 where there is none."""
    last = _last_in_boxes if can_count_without_wait(targets.boxes) else _last_in_slices
    classes = F.pad(targets.classes, (1, 0), value=-1)
    return classes[last(targets, grid, batch=batch)].unflatten(1, grid.hw)


def _last_in_boxes(targets: Targets, grid: Grid, *, batch: int) -> Tensor:
    """1 + the last object (B, h · w) that covers a cell, 0 for none; a mask is sought in its box and a cell around it."""
    boxes = grid.to_cells(target_boxes_px(targets, grid.hw_px))
    grown = torch.cat((boxes[:, :2] - 1, boxes[:, 2:] + 1), dim=1)
    last = torch.zeros(batch * grid.hw[0] * grid.hw[1], dtype=torch.long)
    for part in chunks(grouped(torch.arange(len(targets)), Rectangles.of(grown, grid.hw))):
        owner = part.groups.owner[:, None]
        covered = grid.bits(owner, part.row, part.column) * part.inside
        at = (targets.image[owner] * grid.hw[0] + part.row) * grid.hw[1] + part.column
        last.scatter_reduce_(0, at.flatten(), (covered * (owner + 1)).flatten(), "amax")
    return last.view(batch, -1)


def _last_in_slices(targets: Targets, grid: Grid, *, batch: int) -> Tensor:
    """The same from all cells, for so many objects at once that memory is bounded."""
    row, column = cells_of_map(grid.hw, targets.boxes.device)
    last = torch.zeros(batch, len(row), dtype=torch.long, device=row.device)
    step = max(1, SLICE_CELLS // len(row))
    for i in range(0, len(targets), step):
        number = torch.arange(i, min(i + step, len(targets)), device=row.device)[:, None]
        covered = grid.bits(number, row, column)
        last.scatter_reduce_(0, targets.image[i : i + step, None].expand_as(covered), covered * (number + 1), "amax")
    return last


def target_boxes_px(targets: Targets, hw_px: tuple[float, float]) -> Tensor:
    """Boxes (M, 4) xyxy px of a batch's objects."""
    return denormalised(cxcywh_to_xyxy(targets.boxes.float()), hw_px)


def target_masks(targets: Targets) -> Tensor:
    """The packed masks (M, h, ⌈w / 8⌉) of a batch's objects.

    Raises:
        UserError: there are objects without masks.
    """
    if targets.masks is None and len(targets):
        raise UserError(NO_MASKS)
    return torch.zeros(0, 1, 1, dtype=torch.uint8, device=targets.boxes.device) if targets.masks is None else targets.masks


def grid_of(predicted: BatchOfBranches, prototypes: Tensor) -> Grid:
    """The map of some prototypes (B, K, h, w), and the masks."""
    targets = predicted.targets
    return Grid((prototypes.shape[-2], prototypes.shape[-1]), predicted.hw_px, target_masks(targets), targets.mask_width)
