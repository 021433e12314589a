"""Heads of instance segmentation without anchors: each cell predicts mask coefficients besides, and prototypes are computed once an image.

YOLACT, arXiv 1904.02689: a detection's mask is the sum of the prototypes, weighted with its coefficients, where it is positive.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from models.heads.anchor_free import (
    BINS,
    TOWER_OUTPUT,
    BranchNames,
    DDetect,
    Detect,
    DetectV9,
    DistributionHead,
    LightDetect,
)
from models.heads.anchor_segment import AnchorSegment
from models.heads.base import Deployed, Head, ParameterPart
from models.heads.end_to_end import BOTH, NAMES, EndToEndDetect, LightEndToEndDetect
from models.heads.mask_rows import segment_row
from models.heads.multi_branch import AUXILIARY, MAIN
from models.layers.conv import Conv
from models.layers.prototypes import FusedPrototypes, NearestPrototypes, Prototypes
from models.losses.segment import COEFFICIENTS, PROTOTYPES, SEMANTIC, MaskTerm, SemanticTerm
from models.losses.terms import LossTerm
from models.spec.channel_rules import HeadForm
from models.spec.registry import register
from tasks.segment import SEGMENT
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.config import Hyperparameters

MASKS, HIDDEN = 32, 256  # published numbers of prototypes, and width of the convolutions before them
MOST_MASKS = 256
AUXILIARY_PROTOTYPES = "auxiliary prototypes"
SEMANTIC_BRANCH = "proto.semseg"


class SegmentBase(DistributionHead):
    """A detection head with one tower of mask coefficients a level and branch, and prototypes.

    The coefficients (B, masks, H_i, W_i) are in ``HeadOutput.fields``, the prototypes (B, masks, h, w), at a quarter of the image's size,
    in ``HeadOutput.shared``. Layers have the published names: ``proto``, and ``cv4`` behind cv2 and cv3 of a single branch.
    """

    task = SEGMENT
    copied_attributes = (*DistributionHead.copied_attributes, "masks", "hidden")
    masks: int
    hidden: int

    def __init__(self, nc: int, channels: Sequence[int], *, reg_max: int = BINS, masks: int = MASKS, hidden: int = HIDDEN) -> None:
        """
        Args:
            nc: number of classes.
            channels: width of each input.
            reg_max: bins of each side's distribution; 1 for plain distances.
            masks: number of prototypes.
            hidden: width of the convolutions before them.

        Raises:
            UserError: as :class:`DistributionHead`, or no prototypes.
        """
        self._set_masks(masks, hidden)
        super().__init__(nc, channels, reg_max=reg_max)

    def _set_masks(self, masks: int, hidden: int) -> None:
        if not 1 <= masks <= MOST_MASKS:
            raise UserError(f"masks {masks}: expected a number of prototypes from 1 to {MOST_MASKS}")
        self.masks, self.hidden = masks, hidden

    def _add_branches(self, channels: Sequence[int]) -> None:
        super()._add_branches(channels)
        self._add_prototypes(channels)
        self._add_coefficients(channels)

    def _add_coefficients(self, channels: Sequence[int]) -> None:
        count = self.levels(channels)
        for branch, names in enumerate(self._names()):
            self.add_module(names.fields, self._coefficient_towers(channels[branch * count : (branch + 1) * count]))

    def _coefficient_towers(self, widths: Sequence[int]) -> nn.ModuleList:
        width = max(widths[0] // 4, self.masks)
        return nn.ModuleList(_coefficient_tower(c, width, self.masks) for c in widths)

    def _add_prototypes(self, channels: Sequence[int]) -> None:
        self.proto: nn.Module = Prototypes(channels[0], self.hidden, self.masks)

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        return {**super().parameter_parts(), **mask_parts("cv4", -1), "proto": ParameterPart("prototypes", by_level=False)}

    def _further_modules(self, names: BranchNames) -> Mapping[str, str]:
        return {"proto": "proto"}

    def _hand_over(self, head: DistributionHead, names: Mapping[str, str]) -> None:
        last = {names.fields for names in self._names()}  # as published, behind the prototypes
        super()._hand_over(head, dict(sorted(names.items(), key=lambda item: item[1] in last)))

    def _field_maps(self, names: BranchNames, inputs: Sequence[Tensor]) -> Mapping[str, tuple[Tensor, ...]]:
        return {COEFFICIENTS: tuple(tower(x) for tower, x in zip(getattr(self, names.fields), inputs))}

    def _shared_maps(self, features: Sequence[Tensor]) -> Mapping[str, Tensor]:
        return {PROTOTYPES: self.proto(features[0])}

    def _decode_shared(self, shared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {PROTOTYPES: shared[PROTOTYPES].float()}

    def _loss_terms(self, hyp: Hyperparameters) -> Sequence[LossTerm]:
        return (MaskTerm(hyp.box),)


@register("Segment", channels=segment_row, kind="head")
class Segment(SegmentBase, Detect):
    """YOLOv8's ``Segment``.

    In rows, the dialect, the anchors, the key ``end2end`` and the blocks before it decide which of the heads of this name is meant.
    """

    @classmethod
    def for_row(cls, *, anchors: Any, dialect: str, form: HeadForm) -> type[Head]:
        if cls is not Segment:
            return cls
        if anchors is not None:
            return AnchorSegment
        if form.end2end:
            return LightEndToEndSegment if form.light_classes else EndToEndSegment
        if dialect != "v8":
            return SegmentV9
        return LightSegment if form.light_classes else Segment


class LightSegment(SegmentBase, LightDetect):
    """``Segment`` of YOLO11 and YOLO12, whose class convolutions are depthwise and pointwise pairs."""


class SegmentV9(SegmentBase, DetectV9):
    """YOLOv9's ``Segment``."""

    def _add_prototypes(self, channels: Sequence[int]) -> None:
        self.proto = NearestPrototypes(channels[0], self.hidden, self.masks)


class _EndToEndSegment(SegmentBase, EndToEndDetect):
    """Two branches on the same maps, each with coefficients of its own, and one set of prototypes, which the one-to-many branch trains.

    With both branches, a map of the classes is computed in training, which only the loss reads.
    """

    def __init__(
        self,
        nc: int,
        channels: Sequence[int],
        *,
        reg_max: int = BINS,
        branches: str = BOTH,
        masks: int = MASKS,
        hidden: int = HIDDEN,
    ) -> None:
        """
        Args:
            nc: number of classes.
            channels: width of each input.
            reg_max: bins of each side's distribution; 1 for plain distances.
            branches: ``both``, ``one2many`` or ``one2one``, the latter two as ``deploy()`` leaves them.
            masks: number of prototypes.
            hidden: width of the convolutions before them.

        Raises:
            UserError: as :class:`SegmentBase` and :class:`EndToEndDetect`.
        """
        self._set_masks(masks, hidden)
        EndToEndDetect.__init__(self, nc, channels, reg_max=reg_max, branches=branches)

    def _add_coefficients(self, channels: Sequence[int]) -> None:
        first, *others = self._names()
        self.add_module(first.fields, self._coefficient_towers(channels))
        for names in others:
            self.add_module(names.fields, copy.deepcopy(getattr(self, first.fields)))

    def _add_prototypes(self, channels: Sequence[int]) -> None:
        self.proto = FusedPrototypes(channels, self.hidden, self.masks, self.nc if len(self.kept) > 1 else 0)

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        many = {name: replace(part, like_main=True) for name, part in mask_parts(NAMES["one2many"].fields, -2).items()}
        parts = {**EndToEndDetect.parameter_parts.__func__(cls), **many, **mask_parts(NAMES["one2one"].fields, -1)}  # type: ignore[attr-defined]
        return {**parts, "proto": ParameterPart("prototypes", by_level=False)}

    @classmethod
    def class_modules(cls) -> Sequence[str]:
        """The class towers, and the branch of the prototypes that maps the classes in training."""
        return [*super().class_modules(), SEMANTIC_BRANCH]

    def _shared_maps(self, features: Sequence[Tensor]) -> Mapping[str, Tensor]:
        if not (self.training and hasattr(self.proto, "semseg")):
            return {PROTOTYPES: self.proto(features)}
        prototypes, semantic = self.proto.with_semantic(features)  # type: ignore[operator]
        return {PROTOTYPES: prototypes, SEMANTIC: semantic}

    def _only(self, branch: str) -> Deployed:
        deployed = super()._only(branch)
        deployed.head.proto = self.proto.without_semantic()  # type: ignore[operator]
        return deployed

    def _loss_terms(self, hyp: Hyperparameters) -> Sequence[LossTerm]:
        masks = MaskTerm(hyp.box, first_trains=True, by_masks=True)
        return (masks, SemanticTerm(hyp.box)) if len(self.kept) > 1 else (masks,)


class EndToEndSegment(_EndToEndSegment):
    """``Segment`` with ``end2end: True`` behind blocks of YOLOv8."""


@register("Segment26", channels=segment_row, kind="head")
class LightEndToEndSegment(_EndToEndSegment, LightEndToEndDetect):
    """YOLO26's head, with ``reg_max: 1``: the class convolutions are depthwise and pointwise pairs."""


@register("DSegment", channels=segment_row, kind="head")
class DSegment(SegmentBase, DDetect):
    """YOLOv9's head on ``DDetect``: the prototypes are a 1×1 convolution with activation of a map of their own, the last input."""

    image_inputs = 1
    single_name = "DSegment"

    @classmethod
    def main_inputs(cls, count: int) -> tuple[int, ...]:
        branches = cls.input_groups()
        levels = count // branches - 1
        return (*range((branches - 1) * levels, branches * levels), count - 1)

    def levels(self, sources: Sequence[Any]) -> int:
        return len(sources) // self.input_groups() - 1

    def _inputs(self, features: Sequence[Any]) -> Sequence[Sequence[Any]]:
        levels = self.levels(features)
        return [features[i * levels : (i + 1) * levels] for i in range(self.input_groups())]

    def _add_prototypes(self, channels: Sequence[int]) -> None:
        self.proto = Conv(channels[-1], self.masks)

    def _shared_maps(self, features: Sequence[Tensor]) -> Mapping[str, Tensor]:
        return {PROTOTYPES: self.proto(features[-1])}

    def deploy(self) -> Deployed:
        """The main branch alone, with its levels and its prototypes' map."""
        levels, branches = len(self._towers(self._names()[-1])[0]), self.input_groups()
        return super().deploy()._replace(inputs=list(self.main_inputs((levels + 1) * branches)))


@register("DualDSegment", channels=segment_row, kind="head")
class DualDSegment(DSegment):
    """Two ``DSegment`` branches; inputs are three auxiliary levels, three main ones, the auxiliary prototypes' map and the main one's."""

    branch_weights = (AUXILIARY, MAIN)
    image_inputs = 2
    single = DSegment

    def _names(self) -> Sequence[BranchNames]:
        return [names._replace(fields=fields) for names, fields in zip(super()._names(), ("cv6", "cv7"))]

    def _add_prototypes(self, channels: Sequence[int]) -> None:
        self.proto, self.proto2 = (Conv(c, self.masks) for c in channels[-2:])

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        parts = DistributionHead.parameter_parts.__func__(cls)  # type: ignore[attr-defined]
        prototypes = {name: ParameterPart("prototypes", branch, by_level=False) for name, branch in (("proto", -2), ("proto2", -1))}
        return {**parts, **mask_parts("cv6", -2), **mask_parts("cv7", -1), **prototypes}

    def _further_modules(self, names: BranchNames) -> Mapping[str, str]:
        return {"proto": "proto2"}

    def _shared_maps(self, features: Sequence[Tensor]) -> Mapping[str, Tensor]:
        return {AUXILIARY_PROTOTYPES: self.proto(features[-2]), PROTOTYPES: self.proto2(features[-1])}

    def _loss_terms(self, hyp: Hyperparameters) -> Sequence[LossTerm]:
        return (MaskTerm(hyp.box, prototypes=(AUXILIARY_PROTOTYPES, PROTOTYPES)),)


def mask_parts(name: str, place: int) -> dict[str, ParameterPart]:
    """The role of a branch's coefficients; ``place`` counts from the main branch, which is -1."""
    return {name: ParameterPart("mask coefficients", place, output=TOWER_OUTPUT, channels={"mask": slice(0, None)})}


def _coefficient_tower(c_in: int, width: int, masks: int) -> nn.Sequential:
    return nn.Sequential(Conv(c_in, width, 3), Conv(width, width, 3), nn.Conv2d(width, masks, 1))
