"""Heads with two branches on the same maps: one-to-many for a strong training signal, one-to-one for predictions without suppression.

YOLOv10: Real-Time End-to-End Object Detection, arXiv 2405.14458, section 3.1 (consistent dual assignments).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from models.heads.anchor_free import BINS, BranchNames, Detect, branch_parts
from models.heads.base import Deployed, Loss, ParameterPart
from models.layers.conv import DFL
from models.losses.end_to_end import ONE_TO_ONE, EndToEndLoss, Picks, weights_at
from models.spec import channel_rules as rules
from models.spec.registry import register
from utils.errors import UserError, nearest

if TYPE_CHECKING:
    from utils.config import Hyperparameters

NAMES = {
    "one2many": BranchNames("cv2", "cv3", "dfl", "cv4"),
    "one2one": BranchNames("one2one_cv2", "one2one_cv3", "dfl", "one2one_cv4"),  # the distribution's projection is shared
}
BOTH = "both"


class EndToEndDetect(Detect):
    """``Detect`` with ``end2end: True``: a one-to-many branch and, last, the one-to-one branch, which decodes.

    Both read all inputs; in training the one-to-one branch reads them detached, so that only the one-to-many branch trains the layers
    before the head. The one-to-one branch starts as a copy of the other.
    """

    def __init__(self, nc: int, channels: Sequence[int], *, reg_max: int = BINS, branches: str = BOTH) -> None:
        """
        Args:
            nc: number of classes.
            channels: width of each input.
            reg_max: bins of each side's distribution; 1 for plain distances.
            branches: ``both``, ``one2many`` or ``one2one``, the latter two as ``deploy()`` leaves them.

        Raises:
            UserError: as :class:`Detect`, or other branches.
        """
        if branches not in (BOTH, *NAMES):
            known = (BOTH, *NAMES)
            raise UserError(f"branches {branches!r}: unknown, {nearest(str(branches), known) or 'known are ' + ', '.join(known)}")
        self._set_branches(branches)
        super().__init__(nc, channels, reg_max=reg_max)

    def _set_branches(self, branches: str) -> None:
        """Remembers which branches there are; the weights of their losses begin as a training does."""
        self.kept = tuple(NAMES) if branches == BOTH else (branches,)
        self.branch_weights = weights_at(0, 1) if branches == BOTH else (1.0,)
        self.one_to_one = branches != "one2many"

    def _add_branches(self, channels: Sequence[int]) -> None:
        first = self._names()[0]
        self._add_towers(first, channels)
        if self.reg_max > 1:
            self.add_module(first.distribution, DFL(self.reg_max))
        for names in self._names()[1:]:
            for copied, original in zip(self._tower_names(names), self._tower_names(first)):
                self.add_module(copied, copy.deepcopy(getattr(self, original)))

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        many = {name: replace(part, like_main=True) for name, part in branch_parts(NAMES["one2many"], -2).items()}
        return {**many, **branch_parts(NAMES["one2one"], -1)}

    @classmethod
    def input_groups(cls) -> int:
        return 1

    def build_loss(self, hyp: Hyperparameters) -> Loss:
        """The loss of :class:`Detect` with targets of each branch's own, weighted by the schedule of :class:`EndToEndLoss`."""
        picks = {"one2many": Picks(hyp.tal_topk), "one2one": ONE_TO_ONE}
        return EndToEndLoss(hyp, picks=[picks[name] for name in self.kept], terms=self._loss_terms(hyp), **self._loss_options())

    def deploy(self) -> Deployed:
        """The one-to-one branch alone, under its own names; the one-to-many branch where that is all there is."""
        return self._only(self.kept[-1])

    def deploy_for_suppression(self) -> Deployed:
        """The one-to-many branch alone; the one-to-one branch where that is all there is."""
        return self._only(self.kept[0])

    def _only(self, branch: str) -> Deployed:
        head = type(self).__new__(type(self))
        nn.Module.__init__(head)
        head._set_branches(branch)
        kept = (*NAMES[branch], *self._further_modules(NAMES[branch]).values())
        self._hand_over(head, dict(zip(kept, kept)))
        inputs = list(range(len(self._towers(NAMES[branch])[0])))
        return Deployed(head.train(self.training), inputs, options={"branches": branch})

    def _names(self) -> Sequence[BranchNames]:
        return [NAMES[name] for name in self.kept]

    def _inputs(self, features: Sequence[Tensor]) -> Sequence[Sequence[Tensor]]:
        detached = [x.detach() for x in features] if self.training else features
        return [detached if name == "one2one" and len(self.kept) > 1 else features for name in self.kept]


@register("v10Detect", channels=rules.head, kind="head")
class LightEndToEndDetect(EndToEndDetect):
    """YOLOv10's head, and YOLO26's with ``reg_max: 1``: the class convolutions are depthwise and pointwise pairs."""

    light_classes = True


Detect.end_to_end_forms |= {False: EndToEndDetect, True: LightEndToEndDetect}
