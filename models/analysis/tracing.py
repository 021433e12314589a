"""One pass of a network on one image that keeps what an explanation needs: maps of rows with their graph, and what modules were given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.model import DRY_RUN_SIZE, Model
from models.spec.channel_rules import LayerPlan
from utils.errors import UserError
from utils.types import Predictions


@dataclass
class Trace:
    """What a pass kept.

    Attributes:
        images: (1, ch, H, W) in 0-1; gradients reach it.
        predictions: decoded, with their graph.
        maps: row -> its output (1, C, h, w), with its graph.
        inputs: name of a module -> what it was given.
        outputs: name of a module -> what it gave.
    """

    images: Tensor
    predictions: Predictions
    maps: dict[int, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def gradients(self, target: Tensor) -> dict[int, Tensor]:
        """Of a scalar, for each row; zeros for rows that it does not depend on. The graph stays."""
        rows = list(self.maps)
        if not target.requires_grad:
            return {row: torch.zeros_like(self.maps[row]) for row in rows}
        found = torch.autograd.grad(target, [self.maps[row] for row in rows], retain_graph=True, allow_unused=True)
        return {row: torch.zeros_like(self.maps[row]) if one is None else one.detach() for row, one in zip(rows, found)}


def trace(model: Model, images: Tensor, rows: Sequence[int], *, modules: Mapping[str, nn.Module] | None = None) -> Trace:
    """Runs one image (1, ch, H, W) in evaluation mode and keeps the maps of some rows, and inputs and outputs of some modules."""
    maps: dict[int, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def call(plan: LayerPlan, layer: nn.Module, given: Any) -> Any:
        out = layer(given)
        if plan.index in rows:
            maps[plan.index] = out
        return out

    own = images.detach().clone().requires_grad_()
    with evaluating(model), torch.enable_grad(), _watching(modules or {}, inputs, outputs):
        predictions = model.head.decode(model.run_rows(own, call))
    return Trace(own, predictions, maps, inputs, outputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _watching(modules: Mapping[str, nn.Module], inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Keeps the first argument and the result of modules while the context lasts."""

    def hook(name: str) -> Any:
        def keep(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if given and isinstance(given[0], Tensor):
                inputs[name] = given[0].detach()
            if isinstance(output, Tensor):
                outputs[name] = output.detach()

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def head_rows(model: Model) -> list[int]:
    """The rows that the main branch of the head reads, finest first."""
    sources = model.plans[-1].sources
    return [sources[i] for i in model.head.main_inputs(len(sources))]


def check_rows(model: Model, rows: Sequence[int]) -> list[int]:
    """Rows whose output is a map; negative numbers count from the head, -1 being the row before it.

    Raises:
        UserError: a row that is not there, or has no map.
    """
    last = len(model.plans) - 2
    checked = []
    for given in rows:
        row = given if given >= 0 else last + 1 + given
        if not 0 <= row <= last:
            raise UserError(f"row {given}: {model.spec.origin} has the rows 0 to {last} before its head")
        shape = model.shapes[row]
        if not (len(shape) == 4 and isinstance(shape[0], int)):
            raise UserError(f"row {given} [{model.plans[row].name}]: gives several maps; choose a row that gives one")
        checked.append(row)
    return list(dict.fromkeys(checked))


def row_title(model: Model, row: int) -> str:
    """Such as ``row 15 C2f, stride 8``."""
    plan = model.plans[row]
    return f"row {row} {plan.name}, stride {stride_of(model, row):g}"


def stride_of(model: Model, row: int) -> float:
    """Px of the input per cell of a row."""
    return DRY_RUN_SIZE / model.shapes[row][-2]
