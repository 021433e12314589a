"""What a network looks like without its numbers: its rows, the names and shapes of their tensors, and which row reads which.

A structure is what two networks are compared by (:mod:`models.transfer.alignment`). It comes from a network, from a YAML
with the names and shapes of a checkpoint, or, where there is no YAML, from names and shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from models.model import Model
from models.spec.channel_rules import LayerPlan
from models.spec.parser import ModelSpec
from models.spec.planning import plan_layers
from models.transfer.head_parts import Parts, parts_of_names

Shape = tuple[int, ...]
STATISTIC = "num_batches_tracked"
REPEAT = re.compile(r"(\d+)\.(.+)")
GAMMA, SCALE = "gamma", "γ"  # the scale of an identity start: among the tensors, and as a place
WITHIN = "attention."  # the module in the bottlenecks of C2f_EMA and its like


def counts(name: str) -> bool:
    """Whether a tensor counts as parameters: weights and running statistics do, a batch norm's step counter does not."""
    return not name.endswith(STATISTIC)


class Place(NamedTuple):
    """Where a tensor stands in a row, whatever the row is wrapped in.

    Attributes:
        repeat: which of the row's repeats.
        name: name within the layer, without identity starts: their scale is ``γ``, and ``m.`` is left out.
    """

    repeat: int
    name: str


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        index: its number in the names, ``model.<index>.``.
        kind: registered name; empty where unknown.
        args: constructor arguments, for layers without tensors.
        written: its arguments in the YAML, before any scaling.
        tensors: name within the row -> shape.
        sources: positions of the rows that it reads, -1 for the image; None where unknown.
        is_head: the detection head.
        branches: of a head, the positions of each branch's inputs among ``sources``, auxiliary branches first.
        head_parts: of a head, what its submodules are for.
    """

    index: int
    kind: str
    args: tuple[Any, ...]
    tensors: Mapping[str, Shape]
    sources: tuple[int, ...] | None = None
    is_head: bool = False
    branches: tuple[tuple[int, ...], ...] = ()
    written: tuple[Any, ...] = ()
    head_parts: Parts = field(default_factory=dict)

    @property
    def wrapped(self) -> bool:
        """Starts as the identity as a whole."""
        return "" in self._identity_starts

    @cached_property
    def _identity_starts(self) -> frozenset[str]:
        """Where in the layer a module is called ``m`` beside a ``gamma``: in all of it (empty), or in its ``….attention.`` (C2f_EMA)."""
        names = {m[2] if (m := REPEAT.fullmatch(n)) and self._repeats else n for n in self.tensors}
        starts = {n.removesuffix(GAMMA) for n in names if n == GAMMA or n.endswith(f"{WITHIN}{GAMMA}")}
        return frozenset(s for s in starts if all(n == s + GAMMA or n.startswith(s + "m.") for n in names if n.startswith(s)))

    @cached_property
    def places(self) -> dict[Place, str]:
        """Place of every tensor -> its name within the row."""
        return {self._place(name): name for name in self.tensors}

    @cached_property
    def size(self) -> int:
        """Elements of all tensors, without step counters."""
        return sum(prod(shape) for name, shape in self.tensors.items() if counts(name))

    @cached_property
    def _repeats(self) -> bool:
        return bool(self.tensors) and all(REPEAT.fullmatch(name) for name in self.tensors)

    def _place(self, name: str) -> Place:
        repeat = 0
        if self._repeats:
            number, name = REPEAT.fullmatch(name).groups()  # type: ignore[union-attr]
            repeat = int(number)
        for start in self._identity_starts:
            if name.startswith(start):
                inner = name.removeprefix(start)
                return Place(repeat, start + (SCALE if inner == GAMMA else inner.removeprefix("m.")))
        return Place(repeat, name)


class Structure(NamedTuple):
    """Rows in order; positions in it are what ``Row.sources`` means.

    Attributes:
        known: whether kinds and edges are known.
        scale: depth, width and cap of the channels that the YAML is read with.
    """

    rows: tuple[Row, ...]
    known: bool
    scale: tuple[float, float, int | None] | None = None

    @property
    def has_head(self) -> bool:
        return bool(self.rows) and self.rows[-1].is_head


def structure_of(model: Model) -> Structure:
    """The structure of a network."""
    return _from_plans(model.spec, model.plans, {name: tuple(value.shape) for name, value in model.state_dict().items()})


def structure_of_weights(shapes: Mapping[str, Shape], spec: ModelSpec | None) -> Structure:
    """The structure of a checkpoint: of its YAML with these tensors, or, without one, of the tensors alone.

    Args:
        shapes: name, ``model.<row>.…``, to shape.

    Raises:
        UserError: the YAML is wrong.
    """
    return _from_names(shapes) if spec is None else _from_plans(spec, plan_layers(spec), shapes)


def _from_plans(spec: ModelSpec, plans: Sequence[LayerPlan], shapes: Mapping[str, Shape]) -> Structure:
    tensors = rows_of(shapes)
    rows = (_planned_row(plan, row.args, tensors.get(plan.index, {})) for plan, row in zip(plans, spec.rows))
    return Structure(tuple(rows), True, (spec.depth, spec.width, spec.max_channels))


def _planned_row(plan: LayerPlan, written: tuple[Any, ...], tensors: Mapping[str, Shape]) -> Row:
    is_head = plan.out_channels == 0
    branches = branch_inputs(plan.cls, len(plan.sources)) if is_head else ()
    parts: Parts = getattr(plan.cls, "parameter_parts", dict)() if is_head else {}
    return Row(plan.index, plan.name, plan.args, tensors, plan.sources, is_head, branches, written, parts)


def _from_names(shapes: Mapping[str, Shape]) -> Structure:
    groups = sorted(rows_of(shapes).items())
    last = groups[-1][0] if groups else -1
    rows = []
    for i, tensors in groups:
        parts = parts_of_names(tensors) if i == last else {}
        rows.append(Row(i, "", (), tensors, is_head=bool(parts), head_parts=parts))
    return Structure(tuple(rows), False)


def branch_inputs(head: Callable[..., Any] | None, count: int) -> tuple[tuple[int, ...], ...]:
    """Positions of each branch's levels among a head's ``count`` inputs, auxiliary branches first."""
    listed = count - getattr(head, "image_inputs", 0)
    levels = listed // len(getattr(head, "branch_weights", (1.0,)))
    groups = [tuple(range(first, first + levels)) for first in range(0, listed, levels)]
    main = tuple(head.main_inputs(count))[:levels] if head is not None and hasattr(head, "main_inputs") else groups[-1]
    return (*(group for group in groups if group != main), main)


def rows_of(shapes: Mapping[str, Shape]) -> dict[int, dict[str, Shape]]:
    """Row number -> name within the row -> shape; names that do not begin with ``model.<row>.`` are left out."""
    rows: dict[int, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        first, _, rest = name.partition(".")
        index, _, inner = rest.partition(".")
        if first == "model" and index.isdecimal() and inner:
            rows.setdefault(int(index), {})[inner] = tuple(shape)
    return rows
