"""Heads for pose estimation: beside a box and classes, every cell predicts the keypoints of an object.

YOLO-Pose (arXiv 2204.06806) introduced them; YOLOv8 and YOLO11 share a head, YOLO26's learns the distribution of the errors as well
(Residual Log-likelihood Estimation, arXiv 2107.11291).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from models.heads.anchor_free import BINS, TOWER_OUTPUT, BranchNames, Detect, DistributionHead
from models.heads.base import Head, ParameterPart
from models.heads.end_to_end import BOTH, NAMES, EndToEndDetect
from models.layers.conv import Conv
from models.layers.flow import RealNVP
from models.losses.keypoints import COARSE, FIELD, FINE, SIGMA, AssigningKeypointTerm, KeypointForm, KeypointGains, KeypointTerm
from models.losses.terms import LossTerm
from models.spec import channel_rules as rules
from models.spec.channel_rules import HeadForm
from models.spec.registry import register
from tasks.keypoints import Keypoints
from tasks.pose import POSE, PoseTask
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.config import Hyperparameters

COCO_SHAPE = (17, 3)
FLOW, KEYPOINTS_END, SIGMA_END = "flow_model", "_kpts", "_sigma"  # published names, or their ends
SIGMAS_OF_A_KEYPOINT = 2  # of x and of y


class KeypointHead(DistributionHead):
    """What pose estimation adds to a head: in every branch convolutions to K · D channels a cell, keypoint by keypoint.

    Attributes:
        keypoints: what they are.
        form: how the channels become positions.
    """

    task = POSE
    form: KeypointForm = COARSE
    copied_attributes = (*DistributionHead.copied_attributes, "keypoints", "task")
    keypoints: Keypoints

    def _set_keypoints(self, kpt_shape: Sequence[int], keypoints: Keypoints | None) -> None:
        """Remembers the keypoints; the task of this head is about them.

        Raises:
            UserError: a shape that cannot be.
        """
        if len(kpt_shape) != 2 or kpt_shape[0] < 1 or kpt_shape[1] not in (2, 3):
            raise UserError(f"kpt_shape {list(kpt_shape)}: keypoints of an object and values of each (2 or 3) are expected: [17, 3]")
        self.keypoints = keypoints or Keypoints(kpt_shape[0], kpt_shape[1])
        self.task = PoseTask(self.keypoints)

    @staticmethod
    def row_arguments(args: Sequence[Any]) -> tuple[None, Sequence[Any]]:
        """A row has ``[nc, kpt_shape]``, and no anchors."""
        return None, args

    @property
    def values(self) -> int:
        """Channels of the keypoints of a cell."""
        return self.keypoints.count * self.keypoints.values

    def _add_branches(self, channels: Sequence[int]) -> None:
        super()._add_branches(channels)
        first, *others = self._names()
        self._add_keypoints(first, channels)
        for names in others:
            self.add_module(names.fields, copy.deepcopy(getattr(self, first.fields)))

    def _add_keypoints(self, names: BranchNames, channels: Sequence[int]) -> None:
        """The keypoint convolutions of a branch, one a level."""
        width = self._width(channels)
        self.add_module(names.fields, nn.ModuleList(self._tower(c, width) for c in channels))

    def _width(self, channels: Sequence[int]) -> int:
        """Of the keypoint convolutions."""
        return max(channels[0] // 4, self.values)

    def _tower(self, c_in: int, width: int) -> nn.Sequential:
        """The keypoint convolutions of a level."""
        return nn.Sequential(*_convolutions(c_in, width), nn.Conv2d(width, self.values, 1))

    @classmethod
    def _field_parts(cls, names: BranchNames, place: int) -> dict[str, ParameterPart]:
        """The roles of a branch's keypoint layers."""
        return {names.fields: ParameterPart("keypoints", place, output=TOWER_OUTPUT)}

    def _field_maps(self, names: BranchNames, inputs: Sequence[Tensor]) -> Mapping[str, tuple[Tensor, ...]]:
        return {FIELD: tuple(tower(x) for tower, x in zip(getattr(self, names.fields), inputs))}

    def _decode_fields(self, raw: Mapping[str, Tensor], points: Tensor, strides: Tensor) -> Mapping[str, Tensor]:
        """Keypoints (B, K · D, N): x and y in px, and how sure the network is that they can be seen."""
        values = raw[FIELD].unflatten(1, self.keypoints.shape)  # (B, K, D, N)
        xy = self.form.positions(values[:, :, :2], points, strides)
        return {FIELD: torch.cat((xy, values[:, :, 2:].sigmoid()), dim=2).flatten(1, 2)}

    def _loss_terms(self, hyp: Hyperparameters) -> Sequence[LossTerm]:
        return (KeypointTerm(self.keypoints, self.form, KeypointGains(hyp.pose, hyp.kobj, hyp.rle)),)


@register("Pose", channels=rules.head, kind="head")
class Pose(KeypointHead, Detect):
    """YOLOv8's and YOLO11's head: three keypoint convolutions a level, dense."""

    forms: ClassVar[dict[tuple[bool, bool], type[Head]]] = {}  # by end2end and light_classes

    def __init__(
        self, nc: int, channels: Sequence[int], kpt_shape: Sequence[int] = COCO_SHAPE, *, reg_max: int = BINS,
        keypoints: Keypoints | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            nc: number of classes.
            channels: width of each input.
            kpt_shape: keypoints of an object, and values of each.
            reg_max: bins of each side's distribution; 1 for plain distances.
            keypoints: the same in full, instead of ``kpt_shape``.

        Raises:
            UserError: as :class:`Detect`, or a shape that cannot be.
        """
        self._set_keypoints(kpt_shape, keypoints)
        super().__init__(nc, channels, reg_max=reg_max)

    @classmethod
    def for_row(cls, *, anchors: Any, dialect: str, form: HeadForm) -> type[Head]:
        """The head that ``Pose`` means in a file; a derived class means itself."""
        return cls.forms[form.end2end, form.light_classes] if cls is Pose else cls

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        return {**super().parameter_parts(), **cls._field_parts(NAMES["one2many"], -1)}


class LightPose(Pose):
    """``Pose`` of YOLO11 and YOLO12, whose class convolutions are depthwise and pointwise pairs."""

    light_classes = True


class EndToEndPose(KeypointHead, EndToEndDetect):
    """``Pose`` with ``end2end: True``: a one-to-many branch and, last, the one-to-one branch, which decodes."""

    def __init__(
        self, nc: int, channels: Sequence[int], kpt_shape: Sequence[int] = COCO_SHAPE, *, reg_max: int = BINS,
        keypoints: Keypoints | None = None, branches: str = BOTH,
    ) -> None:  # fmt: skip
        """
        Args:
            nc: number of classes.
            channels: width of each input.
            kpt_shape: keypoints of an object, and values of each.
            reg_max: bins of each side's distribution; 1 for plain distances.
            keypoints: the same in full, instead of ``kpt_shape``.
            branches: as of :class:`EndToEndDetect`.

        Raises:
            UserError: as :class:`EndToEndDetect`, or a shape that cannot be.
        """
        self._set_keypoints(kpt_shape, keypoints)
        super().__init__(nc, channels, reg_max=reg_max, branches=branches)

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        many = {name: replace(part, like_main=True) for name, part in cls._field_parts(NAMES["one2many"], -2).items()}
        return {**super().parameter_parts(), **many, **cls._field_parts(NAMES["one2one"], -1)}


class LightEndToEndPose(EndToEndPose):
    """The same with depthwise and pointwise pairs as class convolutions."""

    light_classes = True


Pose.forms |= {(False, False): Pose, (False, True): LightPose, (True, False): EndToEndPose, (True, True): LightEndToEndPose}


@register("Pose26", channels=rules.head, kind="head")
class Pose26(LightEndToEndPose):
    """YOLO26's head: the keypoints of a cell are where they are from its centre, and training learns how their errors are distributed.

    A branch's keypoint convolutions end in two: ``cv4_kpts``, and ``cv4_sigma``, two σ a keypoint, which the loss alone reads, as it does
    ``flow_model``, which both branches share. What ``deploy()`` leaves has neither.
    """

    form = FINE

    def _add_branches(self, channels: Sequence[int]) -> None:
        super()._add_branches(channels)
        kept = self._names()
        if len(kept) > 1:  # one branch alone is a deployed head
            self.add_module(FLOW, RealNVP())
        for number, names in enumerate(kept):
            for end, per_keypoint in ((KEYPOINTS_END, self.keypoints.values), (SIGMA_END, SIGMAS_OF_A_KEYPOINT)):
                if end == SIGMA_END and len(kept) == 1:
                    continue
                if number:
                    self.add_module(names.fields + end, copy.deepcopy(getattr(self, kept[0].fields + end)))
                else:
                    outputs = self.keypoints.count * per_keypoint
                    self.add_module(names.fields + end, nn.ModuleList(nn.Conv2d(self._width(channels), outputs, 1) for _ in channels))

    def _width(self, channels: Sequence[int]) -> int:
        return max(channels[0] // 4, self.values + SIGMAS_OF_A_KEYPOINT * self.keypoints.count)

    def _tower(self, c_in: int, width: int) -> nn.Sequential:
        return _convolutions(c_in, width)

    def _field_maps(self, names: BranchNames, inputs: Sequence[Tensor]) -> Mapping[str, tuple[Tensor, ...]]:
        maps = [tower(x) for tower, x in zip(getattr(self, names.fields), inputs)]
        ends = ((FIELD, names.fields + KEYPOINTS_END), (SIGMA, names.fields + SIGMA_END))
        return {field: tuple(last(x) for last, x in zip(getattr(self, module), maps)) for field, module in ends if module in self._modules}

    def _further_modules(self, names: BranchNames) -> Mapping[str, str]:
        kept = names.fields + KEYPOINTS_END
        return {kept: kept}

    @classmethod
    def _field_parts(cls, names: BranchNames, place: int) -> dict[str, ParameterPart]:
        return {
            names.fields: ParameterPart("keypoint tower", place),
            names.fields + KEYPOINTS_END: ParameterPart("keypoints", place),
            names.fields + SIGMA_END: ParameterPart("keypoint sigmas", place),
        }

    def _loss_terms(self, hyp: Hyperparameters) -> Sequence[LossTerm]:
        flow = getattr(self, FLOW) if FLOW in self._modules else None
        gains = KeypointGains(hyp.pose, hyp.kobj, hyp.rle)
        side = self._loss_options()["min_candidate_side"]
        return (AssigningKeypointTerm(self.keypoints, self.form, gains, flow=flow, min_candidate_side=side),)


def _convolutions(c_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(Conv(c_in, width, 3), Conv(width, width, 3))
