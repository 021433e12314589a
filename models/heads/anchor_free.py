"""Anchor-free heads: every cell predicts its distances to the four sides of a box, each as a distribution or plainly, and class scores.

Generalized Focal Loss (arXiv 2006.04388) introduced the distribution; YOLOv8 to YOLO26 share the head described here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from models.assigners.grid import anchor_points, expected_distances
from models.heads.anchor_based import AnchorDetect
from models.heads.base import Deployed, Head, HeadOutput, Loss, ParameterPart
from models.layers.conv import DFL, Conv
from models.losses.task_aligned import TaskAlignedLoss
from models.losses.terms import LossTerm
from models.spec import channel_rules as rules
from models.spec.channel_rules import HeadForm
from models.spec.registry import register
from utils.errors import UserError
from utils.types import Predictions

if TYPE_CHECKING:
    from utils.config import Hyperparameters

TOWER_OUTPUT = "2"  # the last of a tower's three convolutions
BINS = 16  # of each side's distribution: distances 0 … 15 strides
LARGEST_REG_MAX = 64
LEAST_BOX_WIDTH = 16  # of the box convolutions
NOMINAL_SIZE = 640  # px of the image for which the class bias is set
NOMINAL_OBJECTS = 5  # objects expected on such an image
HIGHEST_CONF = 0.999  # above it float32 scores are too coarse to be compared as logits
LOGIT_MARGIN = 1e-2  # so much below the threshold a logit still counts: more than rounding of the score, in half precision as well


class BranchNames(NamedTuple):
    """Published names of a branch's layers: box convolutions, class convolutions, distribution, convolutions of what a task adds."""

    boxes: str
    classes: str
    distribution: str
    fields: str = ""


class DistributionHead(Head):
    """One or several branches; a branch is box convolutions, class convolutions and a ``DFL``, one of each kind of convolution a level.

    The layers of the branches have the published names: cv2, cv3, dfl for the first, cv4, cv5, dfl2 for the second, cv6, cv7, dfl3 for the
    third. Inputs are all levels of the first branch, then all of the second …; auxiliary branches come first, the main one last.
    Raw maps are (B, 4 · reg_max + nc, H, W): reg_max logits each for left, top, right, bottom, then the class logits. With reg_max 1 there
    is no distribution: the four channels are the distances in strides, which may be negative.

    Attributes:
        box_groups: groups of the second and third box convolution (4 in YOLOv9's ``DDetect`` family).
        box_bias: initial bias of the box logits.
        newer_assignment: whether targets are assigned as newer YOLOv8 code does: a box smaller than the second stride has its
            candidates in an area of that size, and a cell is only assigned to a box that contains it.
        light_classes: whether the class convolutions are depthwise 3×3 and pointwise pairs (YOLOv10 and later), not dense 3×3.
        single: the class with one branch that ``deploy()`` returns, None for the class itself; ``single_name`` is its registered name.
        copied_attributes: what ``deploy()`` copies besides modules.
    """

    box_groups = 1
    box_bias = 1.0
    newer_assignment = False
    light_classes = False
    single: type[DistributionHead] | None = None
    single_name = "Detect"
    copied_attributes: tuple[str, ...] = ("nc", "strides", "reg_max")

    def __init__(self, nc: int, channels: Sequence[int], *, reg_max: int = BINS) -> None:
        """
        Args:
            nc: number of classes.
            channels: width of each input, all branches.
            reg_max: bins of each side's distribution; 1 for plain distances.

        Raises:
            UserError: no class, reg_max out of range, or the number of inputs is not a multiple of the number of branches.
        """
        super().__init__()
        groups = self.input_groups()
        if nc < 1:
            raise UserError(f"nc {nc}: a head needs at least one class")
        if not isinstance(reg_max, int) or isinstance(reg_max, bool) or not 1 <= reg_max <= LARGEST_REG_MAX:
            raise UserError(f"reg_max {reg_max!r}: expected a whole number from 1 to {LARGEST_REG_MAX}")
        if not channels or len(channels) % groups:
            raise UserError(f"expected inputs in {groups} group(s) of the same number of levels, got {len(channels)} inputs")
        self.nc, self.reg_max = nc, reg_max
        self.strides = ()
        self._add_branches(channels)

    def _add_branches(self, channels: Sequence[int]) -> None:
        levels = self.levels(channels)
        names = [_names(branch) for branch in range(len(self.branch_weights))]
        for branch, name in enumerate(names):
            self._add_towers(name, channels[branch * levels : (branch + 1) * levels])
        if self.reg_max > 1:
            for name in names:
                self.add_module(name.distribution, DFL(self.reg_max))

    def _add_towers(self, names: BranchNames, widths: Sequence[int]) -> None:
        """The box and class convolutions of a branch that reads maps of these widths."""
        box_width, class_width = self.box_width(widths[0], self.reg_max), self.class_width(widths[0], self.nc)
        self.add_module(names.boxes, nn.ModuleList(_tower(c, box_width, 4 * self.reg_max, self.box_groups) for c in widths))
        tower = _light_tower if self.light_classes else _tower
        self.add_module(names.classes, nn.ModuleList(tower(c, class_width, self.nc) for c in widths))

    def _tower_names(self, names: BranchNames) -> tuple[str, ...]:
        """The module lists, one module a level, that each branch has for itself."""
        return names.boxes, names.classes

    def _further_modules(self, names: BranchNames) -> Mapping[str, str]:
        """Other modules that predictions of this branch need: name in a head with one branch -> name here."""
        return {}

    @classmethod
    def input_groups(cls) -> int:
        """How many branches have inputs of their own."""
        return len(cls.branch_weights)

    @classmethod
    def main_inputs(cls, count: int) -> Sequence[int]:
        return range(count - count // cls.input_groups(), count)

    def levels(self, sources: Sequence[Any]) -> int:
        return len(sources) // self.input_groups()

    @classmethod
    def box_width(cls, first: int, reg_max: int = BINS) -> int:
        """Width of a branch's box convolutions, given its first input's."""
        return rules.make_divisible(max(LEAST_BOX_WIDTH, first // 4, 4 * reg_max), cls.box_groups)

    @classmethod
    def class_width(cls, first: int, nc: int) -> int:
        """Width of a branch's class convolutions, given its first input's (YOLOv9's rule)."""
        return max(first, min(2 * nc, 128))

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        count = len(cls.branch_weights)
        return {key: part for branch in range(count) for key, part in branch_parts(_names(branch), branch - count).items()}

    def forward(self, features: Sequence[Tensor]) -> HeadOutput:
        """Feature maps (B, C_i, H_i, W_i), auxiliary branches first, to raw maps (B, 4 · reg_max + nc, H_i, W_i)."""
        pairs = list(zip(self._names(), self._inputs(features)))
        fields = tuple(self._field_maps(names, inputs) for names, inputs in pairs)
        maps = tuple(self._maps(names, inputs) for names, inputs in pairs)
        return HeadOutput(maps, self._shared_maps(features), fields if any(fields) else ())

    def _field_maps(self, names: BranchNames, inputs: Sequence[Tensor]) -> Mapping[str, tuple[Tensor, ...]]:
        """What a task adds to each cell of a branch: (B, ·, H_i, W_i) a level, by name."""
        return {}

    def _shared_maps(self, features: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """What a task adds for the whole image, from all inputs."""
        return {}

    def _maps(self, names: BranchNames, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        boxes, classes = self._towers(names)
        return tuple(torch.cat((box(x), cls(x)), dim=1) for box, cls, x in zip(boxes, classes, inputs))

    def decode(self, output: HeadOutput) -> Predictions:
        """Main maps to boxes (B, N, 4) xyxy px and scores (B, N, nc), levels in order, cells row by row; in float32 for any input dtype."""
        maps = output.main
        logits = torch.cat([m.flatten(2) for m in maps], dim=2).float()  # (B, 4 · reg_max + nc, N)
        sides, classes = logits.split((4 * self.reg_max, self.nc), dim=1)
        points, strides = anchor_points(maps, self.strides)
        distances = self._distances(sides) * strides  # (B, 4, N) px: left, top, right, bottom
        raw = {name: torch.cat([m.flatten(2) for m in levels], dim=2).float() for name, levels in (output.fields or ({},))[-1].items()}
        fields = self._decode_fields(raw, points, strides)
        corners = self._corners(points, distances, fields)
        return Predictions(
            corners.transpose(1, 2), classes.sigmoid().transpose(1, 2), {name: t.transpose(1, 2) for name, t in fields.items()},
            self._decode_shared(output.shared), unique=self.one_to_one,
        )  # fmt: skip

    def _corners(self, points: Tensor, distances: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Boxes (B, 4, N) xyxy px from cell centres (2, N) and distances (B, 4, N) px to left, top, right and bottom."""
        return torch.cat((points - distances[:, :2], points + distances[:, 2:]), dim=1)

    def _decode_fields(self, raw: Mapping[str, Tensor], points: Tensor, strides: Tensor) -> Mapping[str, Tensor]:
        """What a task adds to each prediction: (B, ·, N) by name, from the raw channels (B, ·, N).

        Args:
            raw: float32, of the main branch.
            points: (2, N) px, centres of the cells.
            strides: (1, N) px.
        """
        return raw

    def _decode_shared(self, shared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a task adds to the predictions of the whole image, from the maps of the whole image."""
        return shared

    def _distances(self, sides: Tensor) -> Tensor:
        """Distances (B, 4, N) in strides of the side channels (B, 4 · reg_max, N)."""
        if self.reg_max == 1:
            return sides
        return expected_distances(sides, getattr(self, self._names()[-1].distribution).conv.weight)

    def decode_above(self, output: HeadOutput, conf: float) -> Predictions:
        """Distributions and class scores are computed for the cells that can pass only: mostly a few of thousands."""
        other = output.fields or output.shared or type(self).decode is not DistributionHead.decode
        if not 0 < conf <= HIGHEST_CONF or other:
            return self.decode(output)
        maps = output.main
        logits = torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in maps], dim=1)  # (B, N, 4 · reg_max + nc), as in memory
        least = math.log(conf / (1 - conf)) - LOGIT_MARGIN
        image, cell = (~(logits[..., 4 * self.reg_max :].amax(dim=2) <= least)).nonzero(as_tuple=True)  # (M,), with NaN as decode has them
        sides, classes = logits[image, cell].float().split((4 * self.reg_max, self.nc), dim=1)
        points, strides = anchor_points(maps, self.strides)
        distances = self._distances(sides[..., None]).squeeze(2) * strides[0, cell, None]  # (M, 4) px
        centres = points.T[cell]
        corners = torch.cat((centres - distances[:, :2], centres + distances[:, 2:]), dim=1)
        return _by_image(corners, classes.sigmoid(), image, batch=len(logits)).replace(unique=self.one_to_one)

    def build_loss(self, hyp: Hyperparameters) -> Loss:
        """Box, class and distribution loss on task-aligned targets, for all branches, and what a task adds."""
        return TaskAlignedLoss(hyp, branch_weights=self.branch_weights, terms=self._loss_terms(hyp), **self._loss_options())

    def _loss_terms(self, hyp: Hyperparameters) -> Sequence[LossTerm]:
        """What a task adds to the loss."""
        return ()

    def _loss_options(self) -> dict[str, Any]:
        """What every loss of such a head takes."""
        return {
            "nc": self.nc,
            "strides": self.strides,
            "min_candidate_side": self.strides[:2][-1] if self.newer_assignment else 0.0,
            "owners_contain": self.newer_assignment,
            "bins": self.reg_max,
        }

    def deploy(self) -> Deployed:
        """The main branch alone, sharing its parameters, under the names of a single-branch head."""
        branches, main = len(self.branch_weights), self._names()[-1]
        levels = len(self._towers(main)[0])
        inputs = list(range((branches - 1) * levels, branches * levels))
        if self.single is None:
            return Deployed(self, inputs)
        head = self.single.__new__(self.single)
        nn.Module.__init__(head)
        self._hand_over(head, {**dict(zip(_names(0), main)), **self._further_modules(main)})
        return Deployed(head.train(self.training), inputs, self.single_name)

    def _hand_over(self, head: DistributionHead, names: Mapping[str, str]) -> None:
        """Gives a head without layers this one's attributes and modules; ``names`` are its own -> this one's."""
        for attribute in self.copied_attributes:
            setattr(head, attribute, getattr(self, attribute))
        for key, name in names.items():
            if name in self._modules:
                head.add_module(key, getattr(self, name))

    def set_strides(self, strides: Sequence[float]) -> None:
        """Stores the strides and sets the biases: box logits to ``box_bias``, classes so that the score at each cell of an image of 640 px
        starts at 5 objects / (classes · cells)."""
        self.strides = tuple(float(s) for s in strides)
        with torch.no_grad():
            for names in self._names():
                for box, cls, stride in zip(*self._towers(names), self.strides):
                    box[-1].bias.fill_(self.box_bias)
                    cls[-1].bias.copy_(torch.log(torch.full((self.nc,), NOMINAL_OBJECTS / self.nc / (NOMINAL_SIZE / stride) ** 2)))

    def _names(self) -> Sequence[BranchNames]:
        """Names of every branch's layers, the main branch last."""
        return [_names(branch) for branch in range(len(self.branch_weights))]

    def _inputs(self, features: Sequence[Tensor]) -> Sequence[Sequence[Tensor]]:
        """The maps that each branch reads."""
        levels = self.levels(features)
        return [features[start : start + levels] for start in range(0, len(features), levels)]

    def _towers(self, names: BranchNames) -> tuple[Any, Any]:
        """Box and class towers of a branch, one of each a level."""
        return getattr(self, names.boxes), getattr(self, names.classes)


class DetectV9(DistributionHead):
    """YOLOv9's ``Detect``: the class convolutions are max(ch0, min(2 nc, 128)) wide."""


@register("Detect", channels=rules.head, kind="head")
class Detect(DistributionHead):
    """YOLOv8's ``Detect``: the class convolutions are max(ch0, min(nc, 100)) wide.

    In rows, the dialect, the anchors, the keys ``end2end`` and ``reg_max`` and the blocks before it decide which of the heads of this name
    is meant (:meth:`for_row`).
    """

    box_bias = 2.0
    newer_assignment = True
    end_to_end_forms: ClassVar[dict[bool, type[Head]]] = {}  # by light_classes; models/heads/end_to_end.py fills it

    @classmethod
    def class_width(cls, first: int, nc: int) -> int:
        return max(first, min(nc, 100))

    @classmethod
    def for_row(cls, *, anchors: Any, dialect: str, form: HeadForm) -> type[Head]:
        """The head that ``Detect`` means in a file of this dialect, with or without anchors; a derived class means itself."""
        if cls is not Detect:
            return cls
        if anchors is not None:
            return AnchorDetect
        if form.end2end:
            return cls.end_to_end_forms[form.light_classes]
        if dialect != "v8":
            return DetectV9
        return LightDetect if form.light_classes else Detect


class LightDetect(Detect):
    """``Detect`` of YOLO11 and YOLO12: the class convolutions are depthwise and pointwise pairs (arXiv 2405.14458, section 3.2)."""

    light_classes = True


@register("DDetect", channels=rules.head, kind="head")
class DDetect(DistributionHead):
    """YOLOv9's decoupled head: the last two box convolutions are in 4 groups, one for each side."""

    box_groups = 4
    single_name = "DDetect"


def branch_parts(names: BranchNames, place: int) -> dict[str, ParameterPart]:
    """The roles of a branch's layers; ``place`` counts from the main branch, which is -1."""
    return {
        names.boxes: ParameterPart("box", place, output=TOWER_OUTPUT, channels={"box": slice(0, None)}),
        names.classes: ParameterPart("class", place, output=TOWER_OUTPUT, channels={"class": slice(0, None)}),
        names.distribution: ParameterPart("distribution", place, by_level=False),
    }


def _names(branch: int) -> BranchNames:
    if branch == 0:
        return BranchNames("cv2", "cv3", "dfl", "cv4")
    return BranchNames(f"cv{2 * branch + 2}", f"cv{2 * branch + 3}", f"dfl{branch + 1}")


def _by_image(boxes: Tensor, scores: Tensor, image: Tensor, *, batch: int) -> Predictions:
    """Rows (M, ·) of all images, ordered by image, as (B, K, ·): K of the image with the most, the others filled up with score 0."""
    if batch == 1:
        return Predictions(boxes[None], scores[None])
    counts = torch.bincount(image, minlength=batch)
    most = int(counts.max()) if batch else 0
    place = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]
    padded = [rows.new_zeros(batch, most, rows.shape[1]) for rows in (boxes, scores)]
    for to, rows in zip(padded, (boxes, scores)):
        to[image, place] = rows
    return Predictions(padded[0], padded[1])


def _tower(c_in: int, width: int, c_out: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(Conv(c_in, width, 3), Conv(width, width, 3, g=groups), nn.Conv2d(width, c_out, 1, groups=groups))


def _light_tower(c_in: int, width: int, c_out: int) -> nn.Sequential:
    """Two pairs of a depthwise 3×3 and a pointwise convolution, and the output."""
    pairs = (nn.Sequential(Conv(c, c, 3, g=c), Conv(c, width, 1)) for c in (c_in, width))
    return nn.Sequential(*pairs, nn.Conv2d(width, c_out, 1))
