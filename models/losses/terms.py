"""What a task adds to the loss of anchor-free heads: further terms over the same assignment, and another measure of overlap for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.assigners.grid import LevelGrid
from models.assigners.targets import PaddedTargets, rows_of_places
from models.assigners.task_aligned import Assignment, OverlapMeasure
from utils.types import Batch, Targets


class BatchOfBranches(NamedTuple):
    """What K branches that are assigned together predict of a batch, beside boxes and classes, and what they should."""

    fields: Sequence[Mapping[str, tuple[Tensor, ...]]]  # of each branch, as in HeadOutput
    shared: Mapping[str, Tensor]  # as in HeadOutput
    first: int  # number of the first of the branches among the head's
    batch: Batch
    targets: Targets  # of the batch, on the device of the maps
    padded: PaddedTargets  # the same boxes, n an image
    grid: LevelGrid
    hw_px: tuple[float, float]  # of the batch's images

    def field(self, name: str) -> Tensor:
        """A field of all branches as rows (K · B · N, ·), in the order branch, image, cell, in float32; with its gradient."""
        maps = [torch.cat([level.flatten(2) for level in branch[name]], dim=2) for branch in self.fields]  # (B, ·, N) each
        return torch.stack(maps).transpose(2, 3).flatten(0, 2).float()

    def target_row(self) -> Tensor:
        """(B, n) int64, for each place of ``padded`` the row of ``targets``; 0 where there is no box."""
        batch, most = self.padded.valid.shape
        return rows_of_places(self.targets.image, batch_size=batch, max_boxes=most)


class Assigned(NamedTuple):
    """The assigned cells of K branches, R picks an image (see :class:`models.assigners.task_aligned.Assignment`), and their boxes."""

    picks: Assignment
    place: Tensor  # (K · B, R) int64 row of :meth:`BatchOfBranches.field`
    number: Tensor  # (K · B, R) int64 box, counted over images and the n places of each
    predicted_xyxy: Tensor  # (K · B, R, 4) px, with gradient
    true_xyxy: Tensor  # (K · B, R, 4) px


class LossTerm:
    """Further parts of a loss.

    Attributes:
        names: of the parts.
        gains: factor of each.
    """

    names: tuple[str, ...] = ()
    gains: tuple[float, ...] = ()

    def overlap_measure(self, predicted: BatchOfBranches, boxes_xyxy: Tensor) -> OverlapMeasure | None:
        """What the assignment takes in place of the overlap of boxes; None for that.

        Args:
            predicted: what the branches predict.
            boxes_xyxy: (K, B, N, 4) px, predicted, without gradient.
        """
        return None

    def __call__(self, predicted: BatchOfBranches, assigned: Assigned) -> tuple[Tensor, Tensor]:
        """The sums (P, K) of the parts of each branch, and what they are divided by (P, K), which is summed over all ranks first."""
        raise NotImplementedError
