"""The loss of heads with a one-to-many and a one-to-one branch: the same loss on two assignments, weighted by a schedule.

YOLOv10, arXiv 2405.14458, section 3.1, has both assignments from one metric and constant weights; here the weight moves from the
one-to-many to the one-to-one branch during the training, as published with YOLO26.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from models.losses.task_aligned import TaskAlignedLoss

if TYPE_CHECKING:
    from utils.config import Hyperparameters

FIRST_WEIGHT, LAST_WEIGHT = 0.8, 0.1  # of the one-to-many branch, in the first and in the last epoch


class Picks(NamedTuple):
    """How many cells a branch's assignment gives a box."""

    topk: int  # before cells that several boxes picked are resolved
    kept: int | None = None  # after it; None: all


ONE_TO_ONE = Picks(7, 1)


def weights_at(epoch: int, epochs: int) -> tuple[float, float]:
    """Weights of the one-to-many and of the one-to-one branch in an epoch, which counts from 0; together 1."""
    share = max(1 - epoch / max(epochs - 1, 1), 0.0)
    many = LAST_WEIGHT + share * (FIRST_WEIGHT - LAST_WEIGHT)
    return many, 1 - many


class EndToEndLoss(TaskAlignedLoss):
    """:class:`TaskAlignedLoss` with an assignment of its own for each branch.

    Args:
        hyp: as there; ``tal_topk`` is that of ``picks``.
        picks: of each branch, one-to-many first. A single branch has the weight 1.
        options: as there, without ``branch_weights``.
    """

    def __init__(self, hyp: Hyperparameters, *, picks: Sequence[Picks], **options: Any) -> None:
        weights = weights_at(0, 1) if len(picks) > 1 else (1.0,)
        super().__init__(hyp, branch_weights=weights, **options)
        self.assigners = tuple(self.assigner.replace(topk=topk, kept=kept) for topk, kept in picks)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Sets the weights of two branches."""
        if len(self.branch_weights) > 1:
            self.set_branch_weights(weights_at(epoch, epochs))
