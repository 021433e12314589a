"""Anchor-based heads of YOLOv5 and YOLOv7: every anchor of every cell predicts a box, an objectness and class scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from models.assigners.anchor_ratio import Matches, Scene, anchor_grid, decode_places
from models.assigners.autoanchor import about, better_anchors, guessed_anchors
from models.assigners.simota import SimOTA
from models.heads.base import Deployed, Head, HeadOutput, Loss, ParameterPart
from models.layers.conv import bias_of
from models.layers.implicit import ImplicitA, ImplicitM
from models.losses.yolov5 import AnchorLoss, Gains
from models.spec import channel_rules as rules
from models.spec.registry import register
from utils.errors import UserError
from utils.types import Predictions

if TYPE_CHECKING:
    from utils.config import Hyperparameters

NOMINAL_SIZE = 640  # px of the image for which the objectness bias is set
NOMINAL_OBJECTS = 8  # objects expected on such an image
VALUES = {"box": slice(0, 4), "objectness": slice(4, 5), "class": slice(5, None)}  # output channels of one anchor
CERTAIN = 20.0  # a logit whose sigmoid is 1 in float32


class AnchorDetect(Head):
    """YOLOv5's ``Detect``: one 1×1 convolution a level.

    Raw maps are (B, anchors · (5 + nc), H, W); a place's outputs are x, y, w, h, objectness, classes. The buffer ``anchors`` (levels,
    anchors a cell, 2) is in strides, as in the published checkpoints. YOLOv7's also contain them in px as ``anchor_grid``, which this
    head does not have and ignores when loading.

    Attributes:
        further_outputs: outputs of a place behind its classes.
        only_counted: whether only the number of anchors was given: they start as :func:`guessed_anchors`, and autoanchor fits them.
    """

    anchor_based = True
    further_outputs = 0
    only_counted = False
    anchors: Tensor

    def __init__(self, nc: int, anchors: Sequence[Sequence[float]] | int, channels: Sequence[int]) -> None:
        """
        Args:
            nc: number of classes.
            anchors: for each level width, height, width, height … in px; or the number per cell.
            channels: width of each input.

        Raises:
            UserError: no class, or the anchors do not fit the inputs.
        """
        super().__init__()
        levels = len(channels) // len(self.branch_weights)
        if nc < 1:
            raise UserError(f"nc {nc}: a head needs at least one class")
        if isinstance(anchors, int):
            if anchors < 1:
                raise UserError(f"anchors {anchors}: a cell needs at least one anchor")
            self.only_counted = True
            anchors = guessed_anchors(anchors, [1.0] * levels).flatten(1).tolist()
        if not channels or len(anchors) * len(self.branch_weights) != len(channels):
            raise UserError(f"has {len(channels)} inputs in {len(self.branch_weights)} branch(es) and anchors for {len(anchors)} levels")
        self.nc, self.outputs = nc, nc + 5 + self.further_outputs
        self.strides = ()
        self.register_buffer("anchors", torch.tensor(anchors, dtype=torch.float32).view(levels, -1, 2))
        self._from_small_to_large = sum(anchors[0]) <= sum(anchors[-1])
        self._add_grid()
        self.m = nn.ModuleList(nn.Conv2d(c, self.level_width, 1) for c in channels[:levels])

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        return {
            "m": ParameterPart("output", channels=VALUES, by_anchor=True, behind="proto.cv3.conv.weight"),
            "anchors": ParameterPart("anchors", by_level=False),
        }

    @property
    def level_width(self) -> int:
        """Channels of a level's raw map: anchors · (5 + nc)."""
        return self.outputs * self.anchors.shape[1]

    def _add_grid(self) -> None:
        """Hook for YOLOv7's heads, which have a second copy of the anchors."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if "anchor_grid" not in self._buffers:
            state_dict.pop(f"{prefix}anchor_grid", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, features: Sequence[Tensor]) -> HeadOutput:
        """Feature maps (B, C_i, H_i, W_i) to raw maps (B, anchors · (5 + nc), H_i, W_i)."""
        return HeadOutput((tuple(conv(x) for conv, x in zip(self.m, features)),))

    def decode(self, output: HeadOutput) -> Predictions:
        """Main maps to boxes (B, N, 4) xyxy px and scores (B, N, nc), by level, anchor and cell; in float32 for any input dtype.

        A class's score is objectness times class probability.
        """
        maps = [m.float() for m in output.main]
        raw = torch.cat([m.unflatten(1, (-1, self.outputs)).transpose(1, 2).flatten(2) for m in maps], dim=2)  # (B, 5 + nc, N)
        box, objectness, classes, further = raw.split((4, 1, self.nc, self.further_outputs), dim=1)
        grid = anchor_grid(maps, self.anchors, self.strides)
        scores = self._scores(objectness.sigmoid(), classes.sigmoid()).transpose(1, 2)
        return self._with_further(Predictions(decode_places(box, grid), scores), further.transpose(1, 2), output)

    def _with_further(self, predictions: Predictions, further: Tensor, output: HeadOutput) -> Predictions:
        """The predictions with what a task adds: (B, N, further outputs) as they are, and maps of the whole image."""
        return predictions

    def _scores(self, objectness: Tensor, classes: Tensor) -> Tensor:
        return objectness * classes

    def build_loss(self, hyp: Hyperparameters) -> Loss:
        """Gains are scaled as YOLOv5 and v7 do: by 3 / levels, classes / 80, and the image's area / 640²."""
        return AnchorLoss(hyp, self._gains(hyp), **self._loss_options(hyp))

    def _loss_options(self, hyp: Hyperparameters) -> dict[str, Any]:
        """What every loss of such a head takes."""
        return {
            "nc": self.nc,
            "strides": self.strides,
            "anchors": lambda: self.anchors,
            "branch_weights": self.branch_weights,
            "assign": self._assigner(hyp),
            "obj_by_area": True,
        }

    def _gains(self, hyp: Hyperparameters) -> Gains:
        levels = 3 / len(self.m)
        return Gains(box=hyp.box * levels, obj=hyp.obj * levels, cls=hyp.cls * levels * self.nc / 80, seg=hyp.box * levels)

    def _assigner(self, hyp: Hyperparameters) -> Callable[[Scene], Matches] | None:
        return None

    def deploy(self) -> Deployed:
        return Deployed(self, list(range(len(self.m))), "Detect")

    def set_strides(self, strides: Sequence[float]) -> None:
        """Stores the strides, converts the anchors to their units (and level order), and sets the initial biases:
        8 objects on an image of 640 px, and classes at 0.6 / nc."""
        self.strides = tuple(float(s) for s in strides)
        with torch.no_grad():
            flip = self._from_small_to_large != (self.strides[0] <= self.strides[-1])
            listed = self.anchors.flip(0) if flip else self.anchors.clone()
            self.set_anchors(guessed_anchors(self.anchors.shape[1], self.strides) if self.only_counted else listed)
            for convs in self._outputs():
                for conv, stride in zip(convs, self.strides):
                    bias = bias_of(cast("nn.Conv2d", conv)).view(-1, self.outputs)
                    bias[:, 4] += math.log(NOMINAL_OBJECTS / (NOMINAL_SIZE / stride) ** 2)
                    bias[:, 5 : 5 + self.nc] += math.log(0.6 / (self.nc - 0.99999))

    @property
    def anchors_px(self) -> Tensor:
        """(levels, anchors a cell, 2) width and height in px."""
        return self.anchors * torch.tensor(self.strides, device=self.anchors.device).view(-1, 1, 1)

    def set_anchors(self, anchors_px: Tensor) -> None:
        """Replaces the anchors (levels, anchors a cell, 2) px, in place, so that existing losses read the new ones."""
        strides = torch.tensor(self.strides, device=self.anchors.device).view(-1, 1, 1)
        with torch.no_grad():
            self.anchors.copy_(anchors_px.to(self.anchors) / strides)

    def fit_boxes(self, wh_px: Tensor, hyp: Hyperparameters, *, seed: int = 0, adapt: bool = True) -> str:
        """Keeps the anchors if they fit the boxes, else replaces them (autoanchor); guessed anchors are always replaced."""
        now = self.anchors_px
        guess = guessed_anchors(now.shape[1], self.strides).to(now)
        guessed = self.only_counted and torch.allclose(now, guess)  # False once a checkpoint's anchors were loaded
        if not adapt:
            return f"anchors: {'the first guess' if guessed else 'kept'}, as --noautoanchor says ({about(wh_px, now, hyp.anchor_t)})"
        anchors_px, line = better_anchors(wh_px, now, anchor_t=hyp.anchor_t, seed=seed, guessed=guessed)
        self.set_anchors(anchors_px)
        return line

    def _outputs(self) -> tuple[nn.ModuleList, ...]:
        """The output convolutions of all branches."""
        return (self.m,)


@register("IDetect", channels=rules.head, kind="head")
class IDetect(AnchorDetect):
    """YOLOv7's head: a learned vector is added before the output convolution and another multiplied after it.

    With one class, scores are the objectness alone. ``deploy()`` folds the vectors: W' = W · m, b' = (b + W a) · m. The buffer
    ``anchor_grid`` repeats the anchors in px under its published name and is not used.
    """

    anchor_grid: Tensor
    overlaps = 10  # overlaps whose sum is the number of places of a box in OTA

    def __init__(self, nc: int, anchors: Sequence[Sequence[float]] | int, channels: Sequence[int]) -> None:
        super().__init__(nc, anchors, channels)
        self._add_auxiliary(channels)
        self.ia = nn.ModuleList(ImplicitA(c) for c in channels[: len(self.m)])
        self.im = nn.ModuleList(ImplicitM(self.level_width) for _ in self.m)

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        return {
            **super().parameter_parts(),
            "ia": ParameterPart("implicit addition"),
            "im": ParameterPart("implicit factor", channels=VALUES, dim=1, by_anchor=True),
            "anchor_grid": ParameterPart("anchors in px", by_level=False),
        }

    def _add_grid(self) -> None:
        self.register_buffer("anchor_grid", self.anchors.clone().view(len(self.anchors), 1, -1, 1, 1, 2))

    def _add_auxiliary(self, channels: Sequence[int]) -> None:
        """For a head with a second branch, whose layers are registered before the implicit ones."""

    def forward(self, features: Sequence[Tensor]) -> HeadOutput:
        return HeadOutput((tuple(im(conv(ia(x))) for im, conv, ia, x in zip(self.im, self.m, self.ia, features)),))

    def _assigner(self, hyp: Hyperparameters) -> Callable[[Scene], Matches] | None:
        return SimOTA(nc=self.nc, anchor_t=hyp.anchor_t, topk=self.overlaps) if hyp.loss_ota else None

    def deploy(self) -> Deployed:
        """A plain ``Detect`` on the main branch's inputs."""
        head = AnchorDetect.__new__(AnchorDetect)
        nn.Module.__init__(head)
        head.nc, head.outputs, head.strides = self.nc, self.outputs, self.strides
        head.register_buffer("anchors", self.anchors.clone())
        layers = cast("Iterable[tuple[nn.Conv2d, ImplicitA, ImplicitM]]", zip(self.m, self.ia, self.im))
        head.m = nn.ModuleList(self._folded(conv, add, multiply) for conv, add, multiply in layers)
        return Deployed(head.train(self.training), list(range(len(self.m))), "Detect")

    @torch.no_grad()
    def _folded(self, conv: nn.Conv2d, add: ImplicitA, multiply: ImplicitM) -> nn.Conv2d:
        folded = nn.Conv2d(conv.in_channels, conv.out_channels, 1, device=conv.weight.device, dtype=conv.weight.dtype)
        weight, bias, m = conv.weight.double(), bias_of(conv).double(), multiply.implicit.double().flatten()
        folded.weight.copy_(weight * m.view(-1, 1, 1, 1))
        bias_of(folded).copy_((bias + (weight.flatten(1) @ add.implicit.double().flatten())) * m)
        if self.nc == 1:  # the class output is not trained, and scores are the objectness alone
            classes = folded.weight.unflatten(0, (-1, self.outputs))[:, 5:], bias_of(folded).view(-1, self.outputs)[:, 5:]
            classes[0].zero_()
            classes[1].fill_(CERTAIN)
        return folded

    def _scores(self, objectness: Tensor, classes: Tensor) -> Tensor:
        return objectness if self.nc == 1 else objectness * classes

    def set_anchors(self, anchors_px: Tensor) -> None:
        super().set_anchors(anchors_px)
        with torch.no_grad():
            self.anchor_grid.copy_(anchors_px.view_as(self.anchor_grid))


@register("IAuxDetect", channels=rules.head, kind="head")
class IAuxDetect(IDetect):
    """YOLOv7's head with auxiliary branch: the first half of the inputs is the main one (lead), the second half the auxiliary one.

    The auxiliary branch is plain convolutions ``m2``. In ``HeadOutput`` it comes first, as auxiliary branches always do.
    """

    branch_weights = (0.25, 1.0)
    overlaps = 20

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        return {**super().parameter_parts(), "m2": ParameterPart("output", -2, channels=VALUES, by_anchor=True)}

    @classmethod
    def main_inputs(cls, count: int) -> Sequence[int]:
        return range(count // len(cls.branch_weights))

    def _add_auxiliary(self, channels: Sequence[int]) -> None:
        self.m2 = nn.ModuleList(nn.Conv2d(c, self.level_width, 1) for c in channels[len(self.m) :])

    def forward(self, features: Sequence[Tensor]) -> HeadOutput:
        """Feature maps, main branch first, to raw maps, auxiliary branch first."""
        levels = len(self.m)
        (main,) = super().forward(features[:levels]).branches
        return HeadOutput((tuple(conv(x) for conv, x in zip(self.m2, features[levels:])), main))

    def _outputs(self) -> tuple[nn.ModuleList, ...]:
        return self.m, self.m2
