"""The network: layers in the order of their rows, the graph between them, and the two ways of reducing it for inference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.heads.base import Head, HeadOutput
from models.size_limit import AllocationLimit
from models.spec.channel_rules import LayerPlan
from models.spec.parser import ModelSpec, Row
from models.spec.planning import doubtful_rows, needed, plan_layers
from models.spec.row_arguments import what_it_takes
from tasks import Task
from utils.errors import UserError, place_in_plugin
from utils.reading.limits import LARGEST_NETWORK
from utils.types import Predictions

BATCH_NORM_EPS, BATCH_NORM_MOMENTUM = 1e-3, 0.03  # of the published YOLOs, set on every batch norm of a network unless its head says other
FAULTS = (  # of a layer that does not fit, or of a user's own
    AssertionError, AttributeError, IndexError, KeyError, NameError, RuntimeError, TypeError, ValueError, ZeroDivisionError,
)  # fmt: skip
DRY_RUN_SIZE = 256  # px; a multiple of every stride in use
PIXELS_A_THREAD = 2 * 640 * 512  # of images that a CPU infers together: maps of more fall out of its cache (measured with 1 and 2 threads)
NOT_TENSORS = (str, PurePath, np.ndarray, list, tuple, type(None))  # what people call a network with; tracers have tensors of their own


class Model(nn.Module):
    """A network: (B, ch, H, W) images in 0-1 to the raw maps of its head.

    Attributes:
        spec: the YAML it was built from.
        plans: one plan a layer: what it is, what it reads.
        model: the layers, by row (parameters are called ``model.0.conv.weight`` as in the published models).
        names: class names.
        strides: px of the input per cell for each level of the main branch.
        shapes: output shape(s) of every row in the dry run at ``DRY_RUN_SIZE`` px.
    """

    def __init__(self, spec: ModelSpec, *, names: Sequence[str] | None = None, most_values: int = LARGEST_NETWORK) -> None:
        super().__init__()
        plans = plan_layers(spec)
        with AllocationLimit(most_values):
            self._assemble(spec, plans, [build_layer(plan, spec) for plan in plans])
        self.names = _class_names(names, spec.nc)
        for module in self._norms_to_set():
            module.eps, module.momentum = BATCH_NORM_EPS, BATCH_NORM_MOMENTUM
        self.strides = self._dry_run()
        self.head.set_strides(self.strides)
        if spec.fused:
            fuse_layers(self.model)

    def _assemble(self, spec: ModelSpec, plans: Sequence[LayerPlan], layers: Sequence[nn.Module]) -> None:
        self.spec = spec
        self.plans = tuple(plans)
        self.model = nn.Sequential(*layers)
        last_use = {s: plan.index for plan in plans for s in plan.sources}  # later rows overwrite earlier ones
        self._released = tuple(tuple(s for s, user in last_use.items() if user == plan.index) for plan in plans)

    def _norms_to_set(self) -> list[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]:
        """The batch norms that have YOLO's eps and momentum, as the head says."""
        kept = {"all": (), "rows": self.head.modules(), "none": self.modules()}[self.head.norm_settings]
        own = set(kept)
        return [m for m in self.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and m not in own]

    @property
    def head(self) -> Head:
        head = self.model[-1]
        assert isinstance(head, Head)
        return head

    @property
    def task(self) -> Task:
        """What its predictions are."""
        return self.head.task

    @property
    def nc(self) -> int:
        """Number of classes."""
        return self.spec.nc

    @property
    def ch(self) -> int:
        """Number of input channels."""
        return self.spec.ch

    @property
    def stride(self) -> int:
        """The largest stride of any row, px: sides of input images should be multiples of it, or maps that are joined differ in size.

        A head may read finer levels only (yolov5-p34), while its network goes down further and up again.
        """
        sides = {side for shape in self.shapes[:-1] for side in _sides(shape)}
        return int(max(*self.strides, *(DRY_RUN_SIZE / side for side in sides if side > 1 and DRY_RUN_SIZE % side == 0)))

    def forward(self, images: Tensor, targets: Any = None) -> HeadOutput:
        """Runs (B, ch, H, W) images in 0-1, sides multiples of :attr:`stride`, to the head's raw maps.

        Args:
            images: of the batch.
            targets: what ``head.targets_of(batch)`` gave, in training.
        """

        if isinstance(images, NOT_TENSORS):
            raise UserError(tensors_wanted(images, self.ch))

        def call(plan: LayerPlan, layer: nn.Module, inputs: Any) -> Any:
            return layer(inputs) if targets is None or plan.out_channels else layer(inputs, targets)

        return self.run_rows(images, call)

    def run_rows(self, images: Tensor, call: Callable[[LayerPlan, nn.Module, Any], Any]) -> Any:
        """Walks the graph: ``call(plan, layer, inputs)`` gives a row's output; maps are released after their last use."""
        outputs: dict[int, Any] = {-1: images}
        for plan, layer, released in zip(self.plans, self.model, self._released):
            inputs = [outputs[s] for s in plan.sources]
            outputs[plan.index] = call(plan, layer, inputs if plan.takes_list else inputs[0])
            for s in released:
                del outputs[s]
        return outputs[len(self.plans) - 1]

    @torch.no_grad()
    def infer(self, images: Tensor) -> HeadOutput:
        """What :meth:`forward` gives of a batch in evaluation mode; a CPU takes few images at a time, which is faster there."""
        parts = few_at_a_time(images)
        return self(images) if len(parts) == 1 else HeadOutput.cat([self(part) for part in parts])

    @torch.no_grad()
    def predict(self, images: Tensor, *, above: float = 0.0) -> Predictions:
        """Boxes (B, N, 4) xyxy px and scores (B, N, nc) for images (B, ch, H, W) in 0-1; always in evaluation mode.

        Candidates whose scores are not above ``above`` may be left out.

        Raises:
            UserError: a path, an array or a list; the message says what takes these.
        """
        if not isinstance(images, Tensor):
            raise UserError(tensors_wanted(images, self.ch))
        was_training = self.training
        if was_training:
            self.eval()
        try:
            output = self.infer(images)
            return self.head.decode_above(output, above) if above > 0 else self.head.decode(output)
        finally:
            if was_training:
                self.train()

    def doubts(self) -> list[str]:
        """A line for everything that can be built and is hardly meant: rows that lead nowhere, levels of the head in falling order."""
        rows = doubtful_rows(self.spec, self.plans)
        return [line for line in (rows, _falling_levels(self)) if line]

    def fuse(self) -> Model:
        """A new Model with batch norms folded and re-parameterised branches merged; this one stays as it is."""
        fused = copy.deepcopy(self).eval()
        fused._fuse_in_place()
        return fused

    def _fuse_in_place(self) -> None:
        fuse_layers(self.model)
        self.spec = replace(self.spec, fused=True)

    def deploy(self, *, fuse: bool = True, for_suppression: bool = False) -> Model:
        """A new Model for inference; this one (and an EMA beside it) stays as it is.

        ``for_suppression`` keeps the one-to-many branch of a head that has a one-to-one branch too.

        Drops the auxiliary branches and every layer that only they need, folds identity rows, renumbers, and fuses. An identity row that
        reads the image stays where several rows read it, since a row cannot name the image.
        """
        deployed = self.head.deploy_for_suppression() if for_suppression else self.head.deploy()
        head_sources = tuple(self.plans[-1].sources[i] for i in deployed.inputs)
        plans = [*self.plans[:-1], replace(self.plans[-1], sources=head_sources, name=deployed.name or self.plans[-1].name)]
        plans = _fold_identities(needed(plans), self.model)
        number = {plan.index: new for new, plan in enumerate(plans)} | {-1: -1}
        rows = [_renumbered_row(self.spec.rows[p.index], p, number) for p in plans]
        rows[-1] = _with_options(rows[-1], deployed.options)
        spec = replace(self.spec, rows=tuple(rows))
        layers = [copy.deepcopy(deployed.head if p is plans[-1] else self.model[p.index]) for p in plans]

        reduced = Model.__new__(Model)
        nn.Module.__init__(reduced)
        reduced._assemble(spec, plan_layers(spec), layers)
        reduced.names, reduced.strides = self.names, self.strides
        reduced.shapes = tuple(self.shapes[p.index] for p in plans)
        reduced.eval()
        if fuse:
            reduced._fuse_in_place()
        return reduced

    @torch.no_grad()
    def _dry_run(self) -> tuple[float, ...]:
        """Runs one blank image through, row by row, checks the widths that the rules gave, and returns the strides."""
        shapes: list[Any] = []

        def call(plan: LayerPlan, layer: nn.Module, inputs: Any) -> Any:
            where = f"{self.spec.origin}: row {plan.index} [{plan.name}]"
            try:
                out = layer(inputs)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            except FAULTS as error:
                raise UserError(f"{where}: fails on input {_shape(inputs)}{_arguments_text(plan)}: {_message_of(error)}") from error
            shapes.append(_shape(out))
            _check_width(plan, out, where)
            return out

        self.eval()
        self.run_rows(torch.zeros(1, self.ch, DRY_RUN_SIZE, DRY_RUN_SIZE), call)
        self.train()
        self.shapes = tuple(shapes)
        return self._branch_strides()

    def _branch_strides(self) -> tuple[float, ...]:
        """The strides of the main branch's levels, which auxiliary branches must share: one target is assigned to both.

        Raises:
            UserError: a branch differs; names the levels and the rows that they read.
        """
        plan, levels = self.plans[-1], self.head.levels(self.plans[-1].sources)
        strides = [DRY_RUN_SIZE / self.shapes[s][-2] for s in plan.sources]
        main = self.head.main_inputs(len(strides))
        for start in range(0, len(strides) - self.head.image_inputs, levels):
            differing = [
                f"level {level + 1} has stride {strides[start + level]:g} (row {plan.sources[start + level]}) beside {strides[i]:g} "
                f"(row {plan.sources[i]})"
                for level, i in enumerate(main[:levels])
                if strides[start + level] != strides[i]
            ]
            if differing:
                order = "auxiliary levels first" if main[0] else "main levels first"
                raise UserError(
                    f"{self.spec.origin}: row {plan.index} [{plan.name}]: an auxiliary branch reads other strides than the main one: "
                    f"{'; '.join(differing)}; list all levels of one branch, then of the next, {order}"
                )
        return tuple(strides[i] for i in main[:levels])


def _falling_levels(model: Model) -> str:
    """One line where the head reads coarse levels before fine ones, which published networks do not and transferred heads do not fit."""
    if list(model.strides) == sorted(model.strides):
        return ""
    plan = model.plans[-1]
    sources = [plan.sources[i] for i in model.head.main_inputs(len(plan.sources))]
    order = ", ".join(f"row {source} (stride {stride:g})" for source, stride in zip(sources, model.strides))
    in_order = [source for _, source in sorted(zip(model.strides, sources))]
    return (
        f"{model.spec.origin}: row {plan.index} [{plan.name}]: its levels are not in rising stride: {order}; published networks and "
        f"weights have the finest first: [{', '.join(map(str, in_order))}]"
    )


def build_layer(plan: LayerPlan, spec: ModelSpec) -> nn.Module:
    """Constructs one row's layer within the file's default activation; a constructor's complaint names the row."""
    from models.layers.attention.ops.embedded import Embedded
    from models.layers.attention.ops.identity import IdentityStart
    from models.layers.conv import activation_scope, parse_activation

    assert plan.cls is not None
    cls, whole = plan.cls, plan.identity_start
    if whole and isinstance(cls, Embedded):  # C2f_EMA: the EMA is what was inserted, and the C2f stays in effect
        cls, whole = replace(cls, identity_start=True), False

    def build(args: tuple[Any, ...]) -> nn.Module:
        layer = cls(*args, **plan.kwargs)
        return IdentityStart(layer) if whole else layer

    try:
        with activation_scope(parse_activation(spec.activation or "nn.SiLU")):
            if plan.repeats == 1:
                return build(plan.args)
            return nn.Sequential(build(plan.args), *(build(plan.repeat_args or plan.args) for _ in range(plan.repeats - 1)))
    except FAULTS as error:
        named = isinstance(error, (ValueError, NameError, AttributeError))  # these name the cause itself
        takes = "" if named else f"; it takes {what_it_takes(plan.cls)}"
        raise UserError(f"{spec.origin}: row {plan.index} [{plan.name}]{_arguments_text(plan)}: {_message_of(error)}{takes}") from error


def few_at_a_time(images: Tensor) -> tuple[Tensor, ...]:
    """A batch (B, C, H, W) in equal parts that a CPU infers one after another; whole elsewhere."""
    batch, pixels = len(images), max(1, images.shape[-2:].numel())
    most = max(1, int(PIXELS_A_THREAD * torch.get_num_threads() / pixels))
    if images.device.type != "cpu" or batch <= most:
        return (images,)
    return images.split(next(count for count in range(most, 0, -1) if batch % count == 0))


def tensors_wanted(images: object, channels: int) -> str:
    """What to write in place of ``model("a.jpg")`` where the model is a bare network."""
    given = f"the path {str(images)!r:.60}" if isinstance(images, (str, PurePath)) else f"a {type(images).__name__}"
    return (
        f"a network takes a tensor (B, {channels}, H, W) in 0-1, got {given}; for files, arrays, PIL images and folders: "
        'from engine import load_model; results = load_model("best.pt")("a.jpg")'
    )


def _message_of(error: Exception) -> str:
    text = "divides by an argument that is 0" if isinstance(error, ZeroDivisionError) else " ".join(str(error).split())
    place = place_in_plugin(error)
    return f"{text} ({place})" if place else text


def _arguments_text(plan: LayerPlan) -> str:
    """The constructor's arguments, for messages."""
    return f" with arguments {list(plan.args)}" + (f" and {dict(plan.kwargs)}" if plan.kwargs else "")


def fuse_layers(module: nn.Module) -> None:
    """Replaces in place, inmost first, every module that knows a folded form of itself (``fused()``)."""
    for name, child in list(module.named_children()):
        fuse_layers(child)
        fused = getattr(child, "fused", None)
        if callable(fused):
            setattr(module, name, fused())


def _fold_identities(plans: Sequence[LayerPlan], layers: nn.Sequential) -> list[LayerPlan]:
    """Redirects readers of identity rows to what those read, and drops the rows."""
    kept: list[LayerPlan] = list(plans)
    for plan in plans:
        readers = [p for p in kept if plan.index in p.sources]
        reads_image = plan.sources == (-1,)
        if not getattr(layers[plan.index], "is_identity", False) or (reads_image and (len(readers) != 1 or kept.index(readers[0]) != 1)):
            continue
        redirect = {plan.index: plan.sources[0]}
        kept = [replace(p, sources=tuple(redirect.get(s, s) for s in p.sources)) for p in kept if p.index != plan.index]
    return kept


def _renumbered_row(row: Row, plan: LayerPlan, number: Mapping[int, int]) -> Row:
    """The YAML row of a plan after rows were dropped: -1 for the row before, absolute numbers for the rest."""
    here = number[plan.index]
    sources = tuple(-1 if number[s] == here - 1 else number[s] for s in plan.sources)
    source = sources if isinstance(row.source, tuple) else sources[0]
    module = plan.name if plan.out_channels == 0 else row.module
    return replace(row, source=source, module=module)


def _with_options(row: Row, options: Mapping[str, Any]) -> Row:
    """The row with options in place of those of the same names."""
    if not options:
        return row
    kept = [arg for arg in row.args if not isinstance(arg, Mapping)]
    before = {key: value for arg in row.args if isinstance(arg, Mapping) for key, value in arg.items()}
    return replace(row, args=(*kept, {**before, **options}))


def _check_width(plan: LayerPlan, out: Any, where: str) -> None:
    if plan.out_channels == 0:
        return
    widths = tuple(o.shape[1] for o in out) if isinstance(out, (tuple, list)) else out.shape[1]
    if widths != plan.out_channels:
        raise UserError(
            f"{where}: gives {widths} channels where its channel rule says {plan.out_channels}; register it with a rule for {widths}"
        )


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, HeadOutput):
        return tuple(_shape(v) for v in value.main)
    return tuple(_shape(v) for v in value)


def _sides(shape: Any) -> list[int]:
    """Heights of the maps of one row; a pooled row of single pixels is no map."""
    if shape and isinstance(shape[0], tuple):
        return [side for part in shape for side in _sides(part)]
    return [shape[-2]] if len(shape) == 4 else []


def _class_names(names: Sequence[str] | None, nc: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"class{i}" for i in range(nc))
    if len(names) != nc:
        raise UserError(f"{len(names)} class names for {nc} classes")
    return tuple(map(str, names))
