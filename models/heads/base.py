"""The interface of every head, the only one that scripts and the Model use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tasks import DETECT, Task
from utils.types import Batch, Predictions

if TYPE_CHECKING:
    from utils.config import Hyperparameters


class HeadOutput(NamedTuple):
    """Raw maps of a head, the same type in training, evaluation and export.

    ``branches[b][level]`` is (B, no, H, W), auxiliary branches first, the main branch last. What a task adds for each cell (mask
    coefficients, keypoints, an angle) is in ``fields[b][name][level]``, (B, ·, H, W); ``fields`` is empty where there is nothing. The first
    axis of every tensor is the batch: what parts of one give is joined along it.
    """

    branches: tuple[tuple[Tensor, ...], ...]
    shared: Mapping[str, Tensor] = {}  # maps (B, …) of the whole image by name, such as prototypes
    fields: tuple[Mapping[str, tuple[Tensor, ...]], ...] = ()

    @property
    def main(self) -> tuple[Tensor, ...]:
        """The maps that decode to predictions."""
        return self.branches[-1]

    @classmethod
    def cat(cls, parts: Sequence[HeadOutput]) -> HeadOutput:
        """The maps of several parts of a batch, which one network gave, as those of the whole."""
        branches = tuple(_joined(maps) for maps in zip(*(p.branches for p in parts)))
        shared = {name: torch.cat([p.shared[name] for p in parts]) for name in parts[0].shared}
        fields = tuple({name: _joined([maps[name] for maps in of]) for name in of[0]} for of in zip(*(p.fields for p in parts)))
        return cls(branches, shared, fields)


def _joined(parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(maps) for maps in zip(*parts))


class Loss(Protocol):
    """What ``build_loss`` returns: an object that holds strides and gains and computes loss parts from maps and targets."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts, in the order of the training log, such as ("box", "cls", "dfl")."""

    def compile(self, *, backend: str) -> str:
        """Compiles what training calls, in place; returns why it cannot, empty where it can."""

    def state_dict(self) -> dict[str, Tensor]:
        """State kept from step to step, for a checkpoint; empty for most losses."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a saved state; an empty one resets."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each of a training's epochs, which count from 0, for losses with a schedule; nothing for most."""

    def __call__(self, output: HeadOutput, batch: Batch) -> dict[str, Tensor]:
        """Scalar parts after gains, means over the batch; the training step back-propagates their sum times the batch size."""


class Deployed(NamedTuple):
    """A head without its auxiliary branches, and the positions of the inputs that it still reads among the old head's."""

    head: Head
    inputs: list[int]
    name: str | None = None  # registered name under which a YAML can build it; None: the row's own
    options: Mapping[str, Any] = {}  # what the YAML's row then says besides its arguments


@dataclass(frozen=True)
class ParameterPart:
    """The role of one submodule's (or buffer's) parameters, in terms that are common to all heads.

    When weights are transferred, parts of equal role and branch correspond, level by level.

    Attributes:
        role: such as ``"box"``, ``"class"``, ``"distribution"``, ``"output"`` (all values of an anchor), ``"anchors"``.
        branch: counted from the main one, which is -1.
        by_level: whether the submodule is a list with one module a level.
        output: name, within a level's module, of the layer whose output channels ``channels`` lists; empty for the module itself, ``*``
            for every layer in it.
        channels: meaning -> output channels, those of one anchor where ``by_anchor``; ``"class"`` channels are one a class.
        dim: dimension of the output layer's tensors along which its channels lie.
        by_anchor: whether the channels repeat for every anchor of a cell.
        behind: name of a tensor of the head whose first size is the number of output channels of an anchor behind those of ``channels``,
            which correspond to each other (mask coefficients); a head without it has none.
        like_main: whether the part begins as the main branch's where the source has no such branch.
    """

    role: str
    branch: int = -1
    by_level: bool = True
    output: str = ""
    channels: Mapping[str, slice] = field(default_factory=dict)
    dim: int = 0
    by_anchor: bool = False
    behind: str = ""
    like_main: bool = False


class Head(nn.Module):
    """Base of all heads: the only place that knows how many branches there are.

    Attributes:
        task: kind of result; everything that depends on it is defined there.
        nc: number of classes.
        strides: px of the input per cell for each level, main branch; set by the Model's dry run.
        branch_weights: weight of each branch's loss, auxiliary branches first.
        one_to_one: whether the main branch learns one cell a box, so that its predictions need no suppression.
        never_suppressed: why there is no branch whose predictions go through suppression, not even in training; empty where there may be.
        image_inputs: how many inputs, behind all levels, are maps of the whole image (YOLOv9's prototypes), one a branch.
        norm_settings: which batch norms of a network with this head get the eps and momentum of the published YOLOs: ``all``, ``rows`` (all
            but the head's own), or ``none``, where the published classifiers keep those of the framework.
        mean_loss: whether the loss that is back-propagated is a batch's mean, not that times its images.
        anchor_based: whether the constructor takes anchors: ``cls(nc, anchors, channels)`` instead of ``cls(nc, channels)``.
    """

    task: Task = DETECT
    branch_weights: tuple[float, ...] = (1.0,)
    anchor_based = False
    one_to_one = False
    never_suppressed: ClassVar[str] = ""
    image_inputs = 0
    norm_settings: ClassVar[Literal["all", "rows", "none"]] = "all"
    mean_loss: ClassVar[bool] = False
    nc: int
    strides: tuple[float, ...]

    def forward(self, features: Sequence[Tensor]) -> HeadOutput:
        """Feature maps (B, C_i, H_i, W_i), one a source row, to raw maps."""
        raise NotImplementedError

    def decode(self, output: HeadOutput) -> Predictions:
        """Raw maps of the main branch to boxes (B, N, 4) xyxy px and scores (B, N, nc) in 0-1; pure."""
        raise NotImplementedError

    def decode_above(self, output: HeadOutput, conf: float) -> Predictions:
        """What :meth:`decode` gives of the cells with a score above ``conf``; others may be left out, and rows with score 0 fill up.

        Suppression with this ``conf`` keeps the same of both. Asks the device for the number of cells.
        """
        return self.decode(output)

    def targets_of(self, batch: Batch) -> Any:
        """What :meth:`forward` takes in training of a batch on the device, as a second argument; None where it takes the maps alone."""
        return None

    def build_loss(self, hyp: Hyperparameters) -> Loss:
        """The loss of this head with gains, assigner and box loss as the hyper-parameters say."""
        raise NotImplementedError

    def deploy(self) -> Deployed:
        """This head with only its main branch, sharing its parameters; a head with one branch returns itself."""
        raise NotImplementedError

    def deploy_for_suppression(self) -> Deployed:
        """The same with the branch whose predictions go through suppression, where the main one's need none; else :meth:`deploy`."""
        return self.deploy()

    def set_strides(self, strides: Sequence[float]) -> None:
        """Stores the strides (one per level of one branch) and initialises what depends on them (class biases)."""
        raise NotImplementedError

    def fit_boxes(self, wh_px: Tensor, hyp: Hyperparameters, *, seed: int = 0, adapt: bool = True) -> str:
        """Adapts what depends on the sizes of the training boxes (M, 2) px: the anchors of heads that have them.

        Args:
            wh_px: sizes at the training size.
            hyp: for ``anchor_t``.
            seed: of the search.
            adapt: whether to change them; False only reports the fit.

        Returns:
            One line for the log; empty for a head without anchors.
        """
        return ""

    @classmethod
    def parameter_parts(cls) -> Mapping[str, ParameterPart]:
        """Name of a submodule or buffer -> the role of its parameters; others are transferred by name only."""
        return {}

    @classmethod
    def class_modules(cls) -> Sequence[str]:
        """Names of the submodules that only tell classes for each place of a map: the class towers of every branch."""
        return [name for name, part in cls.parameter_parts().items() if part.role == "class" and part.by_level]

    @classmethod
    def main_inputs(cls, count: int) -> Sequence[int]:
        """Positions of the main branch among ``count`` inputs: those that ``deploy()`` keeps, known before a head is built."""
        return range(count - count // len(cls.branch_weights), count)

    def levels(self, sources: Sequence[Any]) -> int:
        """How many levels one branch has, given the inputs of all branches."""
        return len(sources) // len(self.branch_weights)
