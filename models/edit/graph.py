"""The rows of a network while they are edited: positions are those of the file, and every ``from`` follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as changed

from torch import Tensor

from models.spec.channel_rules import LayerPlan
from models.spec.parser import ModelSpec, Row
from models.spec.planning import needed, plan_layers
from models.spec.registry import BLOCKS, BlockSpec
from utils.errors import UserError

IMAGE = -1


@dataclass(frozen=True)
class Edited:
    """An edited network.

    Attributes:
        spec: its rows.
        original: the rows before.
        rows: old row -> new row, for all that are still there.
        inserted: new numbers of inserted rows.
        replaced: new numbers of rows with another module.
        changes: what was done, a line each.
    """

    spec: ModelSpec
    original: ModelSpec
    rows: Mapping[int, int]
    inserted: tuple[int, ...]
    replaced: tuple[int, ...]
    changes: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """What was done to which file, for the head of a YAML."""
        return [f"{self.spec.origin}, edited (rows as they are numbered here):", *(f"  {change}" for change in self.changes)]

    def renamed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the network before, under the names of this one; entries of removed rows are left out."""
        out = {}
        for key, value in weights.items():
            prefix, _, rest = key.partition(".")
            row, _, name = rest.partition(".")
            if not row.isdecimal():
                out[key] = value
            elif int(row) in self.rows:
                out[f"{prefix}.{self.rows[int(row)]}.{name}"] = value
        return out


@dataclass
class Node:
    """A row whose sources are identities of nodes: the number of a row of the file, larger numbers for inserted rows."""

    row: Row
    sources: list[int]


@dataclass
class EditGraph:
    """The rows of a file while they are edited."""

    spec: ModelSpec
    plans: list[LayerPlan]
    nodes: dict[int, Node]
    order: list[int]
    main: frozenset[int]  # rows that the head's main branch needs
    main_inputs: frozenset[int]  # positions among the head's inputs
    tails: dict[tuple[int, bool], int] = field(default_factory=dict)  # (row, for auxiliary readers) -> last module inserted behind it
    replaced: list[int] = field(default_factory=list)
    changes: list[tuple[str, int | None]] = field(default_factory=list)  # what was done, and the node whose new number belongs behind it

    @classmethod
    def of(cls, spec: ModelSpec) -> EditGraph:
        plans = plan_layers(spec)
        head = plans[-1]
        main_inputs = frozenset(head.cls.main_inputs(len(head.sources)))  # type: ignore[union-attr]
        deployed = [*plans[:-1], changed(head, sources=tuple(head.sources[i] for i in sorted(main_inputs)))]
        nodes = {plan.index: Node(row, list(plan.sources)) for plan, row in zip(plans, spec.rows)}
        return cls(spec, plans, nodes, list(nodes), frozenset(plan.index for plan in needed(deployed)), main_inputs)

    @property
    def head(self) -> int:
        return len(self.plans) - 1

    def at(self, row: int) -> str:
        """A row's place, for messages."""
        return f"{self.spec.origin}: row {row} [{self.plans[row].name}]"

    def check_row(self, row: int, text: str) -> None:
        if not 0 <= row <= self.head:
            raise UserError(f"{text}: {self.spec.origin} has {len(self.plans)} rows, 0 to {self.head} (the head); row {row} is not there")

    def original_edges(self) -> Iterator[tuple[int, int, int, bool]]:
        """(reader, position, source, auxiliary) of every ``from`` of the file; an edge is auxiliary if deploying drops it."""
        for plan in self.plans:
            for position, source in enumerate(plan.sources):
                if plan.index == self.head:
                    yield plan.index, position, source, position not in self.main_inputs
                else:
                    yield plan.index, position, source, plan.index not in self.main

    def reroute(self) -> None:
        """Redirects readers to what was inserted behind their sources."""
        for reader, position, source, auxiliary in self.original_edges():
            tail = self.tails.get((source, auxiliary))
            if tail is not None:
                self.nodes[reader].sources[position] = tail

    def edited(self) -> Edited:
        """The rows under their new numbers, checked as any file's rows are."""
        number = {identity: new for new, identity in enumerate(self.order)} | {IMAGE: IMAGE}
        rows = tuple(_renumbered(self.nodes[identity], identity, number) for identity in self.order)
        spec = changed(self.spec, rows=rows)
        changes = tuple(f"{text}{number[node]}" if node is not None else text for text, node in self.changes)
        try:
            plan_layers(spec)
        except UserError as error:
            raise UserError(f"{error} (rows as they are after: {'; '.join(changes)})") from error
        kept = {old: number[old] for old in self.order if old < len(self.plans)}
        inserted = tuple(number[i] for i in self.order if i >= len(self.plans))
        return Edited(spec, self.spec, kept, inserted, tuple(number[i] for i in self.replaced), changes)


def _renumbered(node: Node, identity: int, number: Mapping[int, int]) -> Row:
    """The row under its new number; what was written absolute stays so, what was written negative where that still is clearer."""
    here = number[identity]
    written = node.row.source if isinstance(node.row.source, tuple) else (node.row.source,)
    sources = tuple(_written(old, number[s], here) for old, s in zip(written, node.sources))
    return changed(node.row, source=sources if isinstance(node.row.source, tuple) else sources[0])


def _written(old: int, source: int, here: int) -> int:
    if old < 0 and source in (here + old, here - 1):
        return source - here
    return source


def find_block(name: str, where: str) -> BlockSpec:
    """The registered block of a name. Raises UserError that names the nearest one."""
    try:
        return BLOCKS[name]
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]}") from error
