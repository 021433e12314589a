"""What each attention module of a network shows of one pass: its own views, or the energy of what it got and gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.analysis.tracing import Trace
from models.layers.explained import PlaneMap, Query, View
from models.model import Model
from models.spec.registry import BLOCKS
from utils.errors import UserError


@dataclass(frozen=True)
class ModuleViews:
    """What one module shows.

    Attributes:
        row: that it is part of.
        name: within the network, such as ``model.9.m.0.attn``.
        kind: its class.
        views: what it shows.
        problem: why there is none, in a line; empty where there are.
    """

    row: int
    name: str
    kind: str
    views: tuple[View, ...]
    problem: str = ""

    @property
    def title(self) -> str:
        """Such as ``row 9 BiLevelRoutingAttention (m.0.attn)``."""
        inner = self.name.split(".", 2)[2:]
        return f"row {self.row} {self.kind}" + (f" ({inner[0]})" if inner else "")


def explainable_modules(model: Model, rows: Sequence[int] = ()) -> dict[str, nn.Module]:
    """Name -> the modules that say something of themselves, and attention modules that say nothing; only of some rows, if given.

    Raises:
        UserError: a row without such a module.
    """
    classes = {spec.cls for spec in map(BLOCKS.__getitem__, BLOCKS) if spec.kind == "attention"}
    found: dict[str, nn.Module] = {}
    by_row = {
        row: dict(_inside(f"model.{row}", layer, lambda module: type(module) in classes)) for row, layer in enumerate(model.model[:-1])
    }
    for row in rows:
        if not by_row.get(row):
            known = ", ".join(str(one) for one, modules in by_row.items() if modules) or "none"
            raise UserError(f"row {row}: no attention module there; rows that have one: {known}")
    for row, modules in by_row.items():
        if not rows or row in rows:
            found.update(modules)
    return found


def module_views(modules: dict[str, nn.Module], trace: Trace, query: Query) -> list[ModuleViews]:
    """The views of every module that the pass went through."""
    return [_views_of(name, module, trace, query) for name, module in modules.items() if name in trace.inputs]


def _inside(name: str, module: nn.Module, is_attention: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules with ``explain``, and the innermost attention modules without."""
    if callable(getattr(module, "explain", None)):
        yield name, module
        return
    below = [found for key, child in module.named_children() for found in _inside(f"{name}.{key}", child, is_attention)]
    if not below and is_attention(module):
        below = [(name, module)]
    yield from below


@torch.no_grad()
def _views_of(name: str, module: nn.Module, trace: Trace, query: Query) -> ModuleViews:
    row, kind = int(name.split(".")[1]), type(module).__name__
    x = trace.inputs[name]
    explain: Any = getattr(module, "explain", None)
    problem = ""
    views: tuple[View, ...] = ()
    if callable(explain):
        try:
            views = tuple(explain(x, query))
        except Exception as error:  # a user's own module; what fails while observing is a line
            problem = f"{kind}.explain: {type(error).__name__}: {error}"
    return ModuleViews(row, name, kind, views or _energies(x, trace.outputs.get(name)), problem)


def _energies(x: Tensor, y: Tensor | None) -> tuple[View, ...]:
    """Root mean square over the channels, of the input, the output and, where they are alike, their difference."""
    maps = [("energy of the input", x), ("energy of the output", y)]
    if y is not None and y.shape == x.shape:
        maps.append(("energy of what it changes", y - x))
    return tuple(PlaneMap(title, one[0].float().square().mean(0).sqrt()) for title, one in maps if one is not None and one.dim() == 4)
