"""Anchor-free heads with a distribution for each box side: every cell predicts its distances to the four sides, and class scores.

Generalized Focal Loss (arXiv 2006.04388) introduced the distribution; YOLOv8 and YOLOv9 share the head described here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.assigners.grid import anchor_points, expected_distances
from models.heads.anchor_based import AnchorDetect
from models.heads.base import Deployed, Head, HeadOutput, Loss, ParameterPart
from models.layers.conv import DFL, Conv
from models.losses.task_aligned import TaskAlignedLoss
from models.spec import channel_rules as rules
from models.spec.registry import register
from utils.errors import UserError
from utils.types import Predictions

if TYPE_CHECKING:
    from utils.config import Hyperparameters

TOWER_OUTPUT = "2"  # the last of a tower's three convolutions
BINS = 16  # of each side's distribution: distances 0 … 15 strides
NOMINAL_SIZE = 640  # px of the image for which the class bias is set
NOMINAL_OBJECTS = 5  # objects expected on such an image
HIGHEST_CONF = 0.999  # above it float32 scores are too coarse to be compared as logits
LOGIT_MARGIN = 1e-2  # so much below the threshold a logit still counts: more than rounding of the score, in half precision as well


class DistributionHead(Head):
    """One or several branches; a branch is box convolutions, class convolutions and a ``DFL``, one of each kind of convolution a level.

    The layers of the branches have the published names: cv2, cv3, dfl for the first, cv4, cv5, dfl2 for the second, cv6, cv7, dfl3 for the
    third. Inputs are all levels of the first branch, then all of the second …; auxiliary branches come first, the main one last.
    Raw maps are (B, 64 + nc, H, W): 16 logits each for left, top, right, bottom, then the class logits.

    Attributes:
        box_groups: groups of the second and third box convolution (4 in YOLOv9's ``DDetect`` family).
        box_bias: initial bias of the box logits.
        newer_assignment: whether targets are assigned as newer YOLOv8 code does: a box smaller than the second stride has its
            candidates in an area of that size, and a cell is only assigned to a box that contains it.
        single: the class with one branch that ``deploy()`` returns, None for the class itself; ``single_name`` is its registered name.
    """

    box_groups = 1
    box_bias = 1.0
    newer_assignment = False
    single: type[DistributionHead] | None = None
    single_name = "Detect"

    def __init__(self, nc: int, channels: Sequence[int]) -> None:
        """
        Args:
            nc: number of classes.
            channels: width of each input, all branches.

        Raises:
            UserError: no class, or the number of inputs is not a multiple of the number of branches.
        """
        super().__init__()
        branches = len(self.branch_weights)
        if nc < 1:
            raise UserError(f"nc {nc}: a head needs at least one class")
        if not channels or len(channels) % branches:
            raise UserError(f"expected inputs in {branches} group(s) of the same number of levels, got {len(channels)} inputs")
        self.nc = nc
        self.strides = ()
        levels = len(channels) // branches
        for branch in range(branches):
            widths = channels[branch * levels : (branch + 1) * levels]
            boxes, classes, _ = _names(branch)
            box_width, class_width = self.box_width(widths[0]), self.class_width(widths[0], nc)
            self.add_module(boxes, nn.ModuleList(_tower(c, box_width, 4 * BINS, self.box_groups) for c in widths))
            self.add_module(classes, nn.ModuleList(_tower(c, class_width, nc) for c in widths))
        for branch in range(branches):
            self.add_module(_names(branch)[2], DFL(BINS))

    @classmethod
    def box_width(cls, first: int) -> int:
        """Width of a branch's box convolutions, given its first input's."""
        return rules.make_divisible(max(first // 4, 4 * BINS), cls.box_groups)

    @classmethod
    def class_width(cls, first: int, nc: int) -> int:
        """Width of a branch's class convolutions, given its first input's (YOLOv9's rule)."""
        return max(first, min(2 * nc, 128))

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        parts = {}
        branches = len(cls.branch_weights)
        for branch in range(branches):
            boxes, classes, dfl = _names(branch)
            place = branch - branches
            parts[boxes] = ParameterPart("box", place, output=TOWER_OUTPUT, channels={"box": slice(0, None)})
            parts[classes] = ParameterPart("class", place, output=TOWER_OUTPUT, channels={"class": slice(0, None)})
            parts[dfl] = ParameterPart("distribution", place, by_level=False)
        return parts

    def forward(self, features: Sequence[Tensor]) -> HeadOutput:
        """Feature maps (B, C_i, H_i, W_i), auxiliary branches first, to raw maps (B, 64 + nc, H_i, W_i)."""
        levels = self.levels(features)
        branches = []
        for branch in range(len(self.branch_weights)):
            boxes, classes, _ = self._branch(branch)
            inputs = features[branch * levels : (branch + 1) * levels]
            branches.append(tuple(torch.cat((box(x), cls(x)), dim=1) for box, cls, x in zip(boxes, classes, inputs)))
        return HeadOutput(tuple(branches))

    def decode(self, output: HeadOutput) -> Predictions:
        """Main maps to boxes (B, N, 4) xyxy px and scores (B, N, nc), levels in order, cells row by row; in float32 for any input dtype."""
        maps = output.main
        logits = torch.cat([m.flatten(2) for m in maps], dim=2).float()  # (B, 64 + nc, N)
        sides, classes = logits.split((4 * BINS, self.nc), dim=1)
        points, strides = anchor_points(maps, self.strides)
        distances = expected_distances(sides, self._branch(-1)[2].conv.weight) * strides  # (B, 4, N) px: left, top, right, bottom
        corners = torch.cat((points - distances[:, :2], points + distances[:, 2:]), dim=1)
        return Predictions(corners.transpose(1, 2), classes.sigmoid().transpose(1, 2))

    def decode_above(self, output: HeadOutput, conf: float) -> Predictions:
        """Distributions and class scores are computed for the cells that can pass only: mostly a few of thousands."""
        if not 0 < conf <= HIGHEST_CONF or type(self).decode is not DistributionHead.decode:  # another decode has other fields
            return self.decode(output)
        maps = output.main
        logits = torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in maps], dim=1)  # (B, N, 64 + nc), copied as it lies in memory
        least = math.log(conf / (1 - conf)) - LOGIT_MARGIN
        image, cell = (~(logits[..., 4 * BINS :].amax(dim=2) <= least)).nonzero(as_tuple=True)  # (M,), with NaN as decode has them
        sides, classes = logits[image, cell].float().split((4 * BINS, self.nc), dim=1)
        points, strides = anchor_points(maps, self.strides)
        projection = self._branch(-1)[2].conv.weight
        distances = expected_distances(sides[..., None], projection).squeeze(2) * strides[0, cell, None]  # (M, 4) px
        centres = points.T[cell]
        corners = torch.cat((centres - distances[:, :2], centres + distances[:, 2:]), dim=1)
        return _by_image(corners, classes.sigmoid(), image, batch=len(logits))

    def build_loss(self, hyp: Hyperparameters) -> Loss:
        """Box, class and distribution loss on task-aligned targets, for all branches."""
        return TaskAlignedLoss(
            hyp,
            nc=self.nc,
            strides=self.strides,
            branch_weights=self.branch_weights,
            min_candidate_side=self.strides[:2][-1] if self.newer_assignment else 0.0,
            owners_contain=self.newer_assignment,
        )

    def deploy(self) -> Deployed:
        """The main branch alone, sharing its parameters, under the names of a single-branch head."""
        branches = len(self.branch_weights)
        boxes, classes, dfl = self._branch(-1)
        inputs = list(range((branches - 1) * len(boxes), branches * len(boxes)))
        if self.single is None:
            return Deployed(self, inputs)
        head = self.single.__new__(self.single)
        nn.Module.__init__(head)
        head.nc, head.strides = self.nc, self.strides
        for key, module in zip(_names(0), (boxes, classes, dfl)):
            head.add_module(key, module)
        return Deployed(head.train(self.training), inputs, self.single_name)

    def set_strides(self, strides: Sequence[float]) -> None:
        """Stores the strides and sets the biases: box logits to ``box_bias``, classes so that the score at each cell of an image of 640 px
        starts at 5 objects / (classes · cells)."""
        self.strides = tuple(float(s) for s in strides)
        with torch.no_grad():
            for branch in range(len(self.branch_weights)):
                boxes, classes, _ = self._branch(branch)
                for box, cls, stride in zip(boxes, classes, self.strides):
                    box[-1].bias.fill_(self.box_bias)
                    cls[-1].bias.copy_(torch.log(torch.full((self.nc,), NOMINAL_OBJECTS / self.nc / (NOMINAL_SIZE / stride) ** 2)))

    def _branch(self, branch: int) -> tuple[Any, Any, Any]:
        """Box towers, class towers and DFL of a branch; -1 is the main one."""
        return tuple(getattr(self, name) for name in _names(branch % len(self.branch_weights)))  # type: ignore[return-value]


class DetectV9(DistributionHead):
    """YOLOv9's ``Detect``: the class convolutions are max(ch0, min(2 nc, 128)) wide."""


@register("Detect", channels=rules.head, kind="head")
class Detect(DistributionHead):
    """YOLOv8's ``Detect``: the class convolutions are max(ch0, min(nc, 100)) wide.

    In rows, the dialect and the anchors decide which of the heads of this name is meant (:meth:`for_row`).
    """

    box_bias = 2.0
    newer_assignment = True

    @classmethod
    def class_width(cls, first: int, nc: int) -> int:
        return max(first, min(nc, 100))

    @classmethod
    def for_row(cls, *, anchors: Any, dialect: str) -> type[Head]:
        """The head that ``Detect`` means in a file of this dialect, with or without anchors; a derived class means itself."""
        if cls is not Detect:
            return cls
        if anchors is not None:
            return AnchorDetect
        return Detect if dialect == "v8" else DetectV9


@register("DDetect", channels=rules.head, kind="head")
class DDetect(DistributionHead):
    """YOLOv9's decoupled head: the last two box convolutions are in 4 groups, one for each side."""

    box_groups = 4
    single_name = "DDetect"


def _names(branch: int) -> tuple[str, str, str]:
    """Published names of a branch's box convolutions, class convolutions and distribution layer."""
    return f"cv{2 * branch + 2}", f"cv{2 * branch + 3}", "dfl" if branch == 0 else f"dfl{branch + 1}"


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
