"""Heads of rotated boxes: an angle for each cell beside box and class, and box sides in the frame of the turned box."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from models.heads.anchor_free import BINS, TOWER_OUTPUT, BranchNames, Detect, DistributionHead
from models.heads.base import Head, ParameterPart
from models.heads.end_to_end import BOTH, NAMES, EndToEndDetect, LightEndToEndDetect
from models.layers.conv import Conv
from models.losses.rotated import ANGLE, AngleTerm, EndToEndRotatedLoss, RotatedLoss, radians, turned_centre
from models.losses.terms import LossTerm
from models.spec import channel_rules as rules
from models.spec.channel_rules import HeadForm
from models.spec.registry import register
from tasks import get_task
from utils.boxes import cxcywh_to_xyxy
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.config import Hyperparameters


class AngleTowers(DistributionHead):
    """What the heads of rotated boxes add to those of axis-aligned ones: convolutions of an angle, with the published names ``cv4``.

    Boxes of the predictions are xyxy before they are turned about their centres; the field ``angle`` (B, N, 1) is in radians, clockwise as
    one sees it.

    Attributes:
        plain_angle: whether the raw channel is the angle itself (YOLO26); else it is (σ − 1/4)π.
        forms: the class of a row by whether it is end to end, whether its class convolutions are light, and ``plain_angle``.
    """

    task = get_task("obb")
    loss_class = RotatedLoss
    plain_angle = False
    forms: ClassVar[dict[tuple[bool, bool, bool], type[Head]]] = {}

    @classmethod
    def row_arguments(cls, args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """Rows are ``[nc]`` or ``[nc, 1]``: the number of angles is no anchors."""
        return None, args

    @classmethod
    def for_row(cls, *, anchors: Any, dialect: str, form: HeadForm) -> type[Head]:
        """The head that a row means in a file of this form; a derived class means itself."""
        if cls not in AngleTowers.forms.values():
            return cls
        return AngleTowers.forms[form.end2end, form.light_classes or cls.plain_angle, cls.plain_angle]

    def _check_angles(self, angles: int) -> None:
        if angles != 1 or isinstance(angles, bool):
            raise UserError(f"{angles!r} angles: a rotated box has one; write [nc, 1]")

    def _add_branches(self, channels: Sequence[int]) -> None:
        """Behind the layers of detection, as published; further branches start as copies of the first."""
        super()._add_branches(channels)
        first, *others = (names.fields for names in self._names())
        width = max(channels[0] // 4, 1)
        self.add_module(
            first, nn.ModuleList(nn.Sequential(Conv(c, width, 3), Conv(width, width, 3), nn.Conv2d(width, 1, 1)) for c in channels)
        )
        for name in others:
            self.add_module(name, copy.deepcopy(getattr(self, first)))

    def _field_maps(self, names: BranchNames, inputs: Sequence[Tensor]) -> Mapping[str, tuple[Tensor, ...]]:
        return {ANGLE: tuple(tower(x) for tower, x in zip(getattr(self, names.fields), inputs))}

    def _decode_fields(self, raw: Mapping[str, Tensor], points: Tensor, strides: Tensor) -> Mapping[str, Tensor]:
        return {ANGLE: radians(raw[ANGLE], plain=self.plain_angle)}

    def _corners(self, points: Tensor, distances: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        low, high = distances.transpose(1, 2).split(2, dim=2)  # (B, N, 2)
        centre = points.T + turned_centre((high - low) / 2, fields[ANGLE].transpose(1, 2))
        return cxcywh_to_xyxy(torch.cat((centre, low + high), dim=2)).transpose(1, 2)

    def _loss_terms(self, hyp: Hyperparameters) -> Sequence[LossTerm]:
        return (AngleTerm(hyp.angle, plain=self.plain_angle, least_side=self._loss_options()["min_candidate_side"]),)

    def _loss_options(self) -> dict[str, Any]:
        return {**super()._loss_options(), "plain_angle": self.plain_angle}


@register("OBB", channels=rules.head, kind="head")
class RotatedDetect(AngleTowers, Detect):
    """YOLOv8's ``OBB``. In rows, the file's key ``end2end`` and its blocks decide which head is meant, as for ``Detect``."""

    def __init__(self, nc: int, channels: Sequence[int], angles: int = 1, *, reg_max: int = BINS) -> None:
        """
        Args:
            nc: number of classes.
            channels: width of each input.
            angles: of a box; only 1 is possible, published rows have it.
            reg_max: bins of each side's distribution; 1 for plain distances.
        """
        self._check_angles(angles)
        super().__init__(nc, channels, reg_max=reg_max)

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        return {**super().parameter_parts(), "cv4": _angle_part(-1)}


class LightRotatedDetect(RotatedDetect):
    """YOLO11's ``OBB``: the class convolutions are depthwise and pointwise pairs."""

    light_classes = True


class PlainAngleDetect(LightRotatedDetect):
    """YOLO26's ``OBB26`` in a file without ``end2end``."""

    plain_angle = True


class EndToEndRotatedDetect(AngleTowers, EndToEndDetect):
    """``OBB`` with ``end2end: True``: a one-to-many branch and the one-to-one branch, which decodes."""

    loss_class = EndToEndRotatedLoss  # type: ignore[assignment]

    def __init__(
        self, nc: int, channels: Sequence[int], angles: int = 1, *, reg_max: int = BINS, branches: str = BOTH
    ) -> None:  # fmt: skip
        """
        Args:
            nc: number of classes.
            channels: width of each input.
            angles: of a box; only 1 is possible, published rows have it.
            reg_max: bins of each side's distribution; 1 for plain distances.
            branches: as :class:`EndToEndDetect`.
        """
        self._check_angles(angles)
        super().__init__(nc, channels, reg_max=reg_max, branches=branches)

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        angles = {NAMES["one2many"].fields: _angle_part(-2, like_main=True), NAMES["one2one"].fields: _angle_part(-1)}
        return {**super().parameter_parts(), **angles}


class LightEndToEndRotatedDetect(EndToEndRotatedDetect, LightEndToEndDetect):
    """``OBB`` with ``end2end: True`` behind the blocks of YOLOv10 and later."""


@register("OBB26", channels=rules.head, kind="head")
class PlainAngleEndToEndDetect(LightEndToEndRotatedDetect):
    """YOLO26's head of rotated boxes: end to end, the angle as it is."""

    plain_angle = True


AngleTowers.forms |= {
    (False, False, False): RotatedDetect,
    (False, True, False): LightRotatedDetect,
    (False, True, True): PlainAngleDetect,
    (True, False, False): EndToEndRotatedDetect,
    (True, True, False): LightEndToEndRotatedDetect,
    (True, True, True): PlainAngleEndToEndDetect,
}


def _angle_part(place: int, *, like_main: bool = False) -> ParameterPart:
    return ParameterPart(ANGLE, place, output=TOWER_OUTPUT, channels={ANGLE: slice(0, None)}, like_main=like_main)
