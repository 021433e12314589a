"""Editing a network's rows: insert same-width modules, replace modules, remove rows; every ``from`` follows by itself.

    python -m models.edit yolov9-c.yaml --insert FocalModulation@9 --init identity --show --out mine.yaml

All positions, of several edits too, are those of the network before any edit. After an insertion every reader of the row reads the
inserted module, in the backbone, the neck and the head alike, with one exception: auxiliary branches, which deploying drops, go on
reading the plain row, as in the variants of YOLOv9 (their gradient reaches the backbone past the module). ``@9+aux`` lets them read it.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any

from torch import Tensor

from models.edit.requests import Insertion, Position, Replacement, once, read_insertion, read_replacement, read_rows
from models.spec import channel_rules as rules
from models.spec.channel_rules import LayerPlan
from models.spec.parser import ModelSpec, Row, load_spec, needed, plan_layers, plan_row
from models.spec.registry import BLOCKS, BlockSpec, load_plugin
from utils.errors import UserError, nearest

IMAGE = -1
INITS = ("", "identity")
# rule -> (leading arguments of a row that are its width, parameters of the constructor that the rule fills in)
LAYERED: dict[Any, tuple[int, int]] = {
    rules.out_width: (1, 2), rules.out_width_repeated: (1, 3), rules.same_width: (0, 1), rules.keep_width: (0, 0),
}  # fmt: skip


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


def edit(
    spec: ModelSpec,
    *,
    insert: str | Sequence[str] = (),
    replace: str | Sequence[str] = (),
    remove: int | str | Sequence[int | str] = (),
    init: str = "",
) -> Edited:
    """Makes all edits at once; ``spec`` stays as it is.

    Args:
        insert: such as ``"FocalModulation@9"``, ``"EMA@4,6,9"``, ``"EMA@detect"`` (after each row that the head's main branch reads),
            ``"EMA@backbone.last"``, ``"BiLevelRoutingAttention@9(n_win=8,topk=4)"``. Two at one row stand there in the order given.
        replace: such as ``"C2f=C2f_EMA@6,8"``. The row's arguments are kept where the new module has parameters of these names;
            positional arguments in brackets, or empty brackets, take the place of all of them; options are added.
        remove: row numbers; readers of a removed row read what it read.
        init: ``"identity"`` starts every inserted module as an exact no-op.

    Raises:
        UserError: what is wrong with a request, quoting file and row.
    """
    if init not in INITS:
        raise UserError(f"init {init!r} is unknown; 'identity' is, or nothing for the module as it is")
    if init and not insert:
        inside = "; the module inside a block that replaces another takes it by name: C2f=C2f_EMA@6(init=identity)"
        raise UserError(f"init {init!r} is about inserted modules, and none is inserted{inside if replace else ''}")
    graph = _Graph.of(spec)
    removed = read_rows(_several(remove))
    replacements = [read_replacement(text) for text in _several(replace)]
    for request in replacements:
        _replace(graph, request, removed)
    for text in _several(insert):
        _insert(graph, read_insertion(text), init, removed)
    graph.reroute()
    if removed:
        _remove(graph, removed)
    return graph.edited()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: edits a model YAML, shows the result and writes it."""
    parser = argparse.ArgumentParser(prog="python -m models.edit", description="inserts, replaces and removes rows of a model YAML")
    parser.add_argument("cfg", help="model YAML, path or bare name")
    parser.add_argument("--insert", nargs="+", default=[], metavar="SPEC", help="FocalModulation@9, EMA@4,6, EMA@detect, 'EMA@9(factor=8)'")
    parser.add_argument("--replace", nargs="+", default=[], metavar="SPEC", help="C2f=C2f_EMA@6,8")
    parser.add_argument("--remove", nargs="+", default=[], metavar="ROW", help="rows whose readers then read what they read")
    parser.add_argument("--init", choices=["identity"], default="", help="start inserted modules as an exact no-op")
    parser.add_argument("--show", action="store_true", help="print the rows with shapes, parameters and readers")
    parser.add_argument("--imgsz", type=int, default=640, help="px, for the shapes")
    parser.add_argument("--out", metavar="FILE", help="write the YAML here")
    parser.add_argument("--nc", type=int, help="number of classes, the YAML's if not given")
    parser.add_argument("--scale", help="letter of a v8 file's scale, instead of the one in the name")
    parser.add_argument("--plugins", nargs="*", default=[], help="Python files with blocks of your own")
    args = parser.parse_args(argv)
    try:
        for path in args.plugins:
            load_plugin(path)
        spec = load_spec(args.cfg, nc=args.nc, scale=args.scale)
        _show_and_write(edit(spec, insert=args.insert, replace=args.replace, remove=args.remove, init=args.init), args)
    except UserError as error:
        sys.exit(f"error: {error}")
    return 0


def _show_and_write(edited: Edited, args: argparse.Namespace) -> None:
    from models.edit.graph_table import graph_table, spec_yaml, write_spec
    from models.model import Model

    if args.imgsz < 1:
        raise UserError(f"--imgsz {args.imgsz}: a side in px is needed, such as 640")
    model = Model(edited.spec)  # says whether it can be built before anything is written
    if args.show:
        print(graph_table(model, imgsz=-(-args.imgsz // model.stride) * model.stride))
    for change in edited.changes:
        print(change)
    if args.out:
        write_spec(args.out, edited.spec, notes=edited.notes)
        print(f"written to {args.out}")
    elif not args.show:
        print(spec_yaml(edited.spec, notes=edited.notes), end="")


def insert(spec: ModelSpec, requests: str | Sequence[str], *, init: str = "") -> Edited:
    """Puts same-width modules after rows; see :func:`edit`."""
    return edit(spec, insert=requests, init=init)


@dataclass
class _Node:
    """A row whose sources are identities of other nodes: its own number for a row of the file, larger ones for inserted rows."""

    row: Row
    sources: list[int]


@dataclass
class _Graph:
    """The rows of a file while they are edited."""

    spec: ModelSpec
    plans: list[LayerPlan]
    nodes: dict[int, _Node]
    order: list[int]
    main: frozenset[int]  # rows that the head's main branch needs
    main_inputs: frozenset[int]  # positions among the head's inputs
    tails: dict[tuple[int, bool], int] = field(default_factory=dict)  # (row, for auxiliary readers) -> last module put after it
    replaced: list[int] = field(default_factory=list)
    changes: list[tuple[str, int | None]] = field(default_factory=list)  # what was done, and the node whose new number belongs behind it

    @classmethod
    def of(cls, spec: ModelSpec) -> _Graph:
        plans = plan_layers(spec)
        head = plans[-1]
        main_inputs = frozenset(head.cls.main_inputs(len(head.sources)))  # type: ignore[union-attr]
        deployed = [*plans[:-1], changed(head, sources=tuple(head.sources[i] for i in sorted(main_inputs)))]
        nodes = {plan.index: _Node(row, list(plan.sources)) for plan, row in zip(plans, spec.rows)}
        return cls(spec, plans, nodes, list(nodes), frozenset(plan.index for plan in needed(deployed)), main_inputs)

    @property
    def head(self) -> int:
        return len(self.plans) - 1

    def at(self, row: int) -> str:
        """The place of a row for messages."""
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
        """Lets readers read what was put after their sources."""
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


def _insert(graph: _Graph, request: Insertion, init: str, removed: Sequence[int]) -> None:
    where = f"{graph.spec.origin}: {request.text}"
    block = _block(request.module, where)
    if block.channels is not rules.same_width:
        raise UserError(
            f"{where}: {block.name} chooses its own output (rule {block.channels.__name__!r}); only same-width modules "
            "(rule same_width) can be inserted, others take a row's place with --replace"
        )
    args = request.args
    if init:
        options = dict(args[-1]) if args and isinstance(args[-1], Mapping) else {}
        args = (*(a for a in args if not isinstance(a, Mapping)), {**options, "init": init})
    for row, auxiliary in _rows_of(graph, request):
        if row in removed:
            raise UserError(f"{where}: row {row} is to be removed; give another row")
        new = Row(row, 1, request.module, args, graph.spec.rows[row].section)
        _check_fits(graph, new, where)
        identity = _put_after(graph, row, changed(new, source=-1), auxiliary or row not in graph.main)
        graph.changes.append((f"{block.name} inserted behind what was row {row}, as row ", identity))


def _put_after(graph: _Graph, row: int, new: Row, auxiliary: bool) -> int:
    """Chains a node behind what was put after ``row`` before."""
    identity = len(graph.nodes)
    before = graph.tails.get((row, False), row)
    graph.nodes[identity] = _Node(new, [before])
    graph.order.insert(graph.order.index(before) + 1, identity)
    graph.tails[row, False] = identity
    if auxiliary:
        graph.tails[row, True] = identity
    return identity


def _rows_of(graph: _Graph, request: Insertion) -> list[tuple[int, bool]]:
    """The rows that the positions mean, with whether auxiliary readers are served."""
    found: list[tuple[int, bool]] = []
    for position in request.positions:
        found += [(row, position.auxiliary) for row in _resolve(graph, position, f"{graph.spec.origin}: {request.text}")]
    once([row for row, _ in found], f"{graph.spec.origin}: {request.text}")
    return found


def _resolve(graph: _Graph, position: Position, where: str) -> list[int]:
    """Row numbers of ``9``, ``detect``, ``detect.0``, ``backbone.last``, ``backbone.4``, ``head.2``."""
    word, _, part = position.name.partition(".")
    number = int(part) if part.isdecimal() else None
    if word.lstrip("-").isdecimal() and not part:
        rows = [int(word)]
    elif word == "detect" and (number is not None or not part):
        sources = graph.plans[-1].sources
        read = list(dict.fromkeys(s for i, s in enumerate(sources) if position.auxiliary or i in graph.main_inputs))
        rows = read if number is None else read[number : number + 1]
    elif word in ("backbone", "head") and (number is not None or part == "last"):
        section = [i for i, row in enumerate(graph.spec.rows) if row.section == word]
        rows = section[-1:] if number is None else section[number : number + 1]
    else:
        hint = nearest(position.name, ("detect", "backbone.last"))
        raise UserError(f"{where}: {position.name!r} is no position; a row number, detect or backbone.last are; {hint}".rstrip("; "))
    if not rows:
        raise UserError(f"{where}: {position.name} is not there")
    for row in rows:
        graph.check_row(row, where)
        if row == graph.head:
            raise UserError(f"{where}: row {row} is the head, the last row; EMA@detect puts a module before each of its inputs")
    return rows


def _check_fits(graph: _Graph, row: Row, where: str) -> None:
    """Refuses what the row's rule or the constructor refuses, in the words of the request."""
    source = row.source
    assert isinstance(source, int)
    try:
        plan_row(graph.spec, row, len(graph.plans), graph.plans)
    except UserError as error:
        raise UserError(f"{where}: after row {source} [{graph.plans[source].name}]: {error}") from error


def _replace(graph: _Graph, request: Replacement, removed: Sequence[int]) -> None:
    where = f"{graph.spec.origin}: {request.text}"
    names = {plan.name for plan in graph.plans} | {row.module for row in graph.spec.rows}
    if request.old not in names and request.old not in BLOCKS:
        raise UserError(f"{where}: no row is {request.old!r}; {nearest(request.old, names)}".rstrip("; "))
    old = BLOCKS[request.old].name if request.old in BLOCKS else request.old
    block = _block(request.new, where)
    standing = [plan.index for plan in graph.plans if plan.name == old]
    for index in request.rows or standing:
        graph.check_row(index, where)
        if index not in standing:
            rows = ", ".join(map(str, standing)) or "no row"
            raise UserError(f"{where}: row {index} is {graph.plans[index].name}, not {request.old}, which stands at {rows}")
        if index in removed or index in graph.replaced:
            raise UserError(f"{where}: row {index} is removed or replaced by another edit, too")
        row = changed(graph.spec.rows[index], module=request.new, args=_kept_args(graph, index, block, request))
        try:
            plan_row(graph.spec, row, index, graph.plans)
        except UserError as error:
            raise UserError(f"{where}: row {index}: {error}") from error
        graph.nodes[index].row = row
        graph.replaced.append(index)
        graph.changes.append((f"{old} replaced by {block.name} in row ", index))
    if not standing:
        raise UserError(f"{where}: no row is {request.old}")


def _kept_args(graph: _Graph, index: int, block: BlockSpec, request: Replacement) -> tuple[Any, ...]:
    """The arguments of the replaced row: those given, or the row's own where the new module has parameters of these names."""
    row, where = graph.spec.rows[index], f"{graph.spec.origin}: {request.text}: row {index}"
    options = {k: v for a in request.args or () if isinstance(a, Mapping) for k, v in a.items()}
    if request.args is not None and (not options or len(request.args) > 1):
        return request.args
    old = BLOCKS[row.module]
    positional = [a for a in row.args if not isinstance(a, Mapping)]
    kept_options = {k: v for a in row.args if isinstance(a, Mapping) for k, v in a.items()} | options
    if old.channels is not block.channels and not {old.channels, block.channels} <= {rules.out_width, rules.out_width_repeated}:
        if positional or kept_options != options:
            args = list(row.args)
            raise UserError(f"{where}: arguments {args} of {old.name} cannot be kept for {block.name}; give its own in brackets")
    elif old.channels in LAYERED:
        lead = LAYERED[old.channels][0] if positional else 0
        if old.channels is rules.same_width and len(positional) == len(graph.plans[index].args):
            lead = 1  # the width was written out
        _check_names(old, block, positional[lead:], kept_options, where)
    return (*positional, kept_options) if kept_options else tuple(positional)


def _check_names(old: BlockSpec, new: BlockSpec, args: Sequence[Any], options: Mapping[str, Any], where: str) -> None:
    """Every argument must mean the same in both: same place, same name."""
    before, after = _own_parameters(old), _own_parameters(new)
    for place, value in enumerate(args):
        name = before[place] if place < len(before) else "?"
        there = after[place] if place < len(after) else None
        if name != there:
            takes = f"takes {there} there" if there else "takes no such argument"
            raise UserError(
                f"{where}: argument {value!r} is {old.name}'s {name}, and {new.name} {takes}; "
                f"give the arguments in brackets: {new.name} takes {', '.join(after) or 'none'} after its width"
            )


def _own_parameters(block: BlockSpec) -> list[str]:
    """Names of a constructor's positional parameters after those that the rule fills in."""
    cls = getattr(block.cls, "outer", block.cls)  # a block with attention inside takes the plain block's arguments
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(cls).parameters.values() if p.kind in kinds][LAYERED[block.channels][1] :]


def _remove(graph: _Graph, removed: Sequence[int]) -> None:
    shapes: Mapping[int, Any] = {}
    for index in removed:
        graph.check_row(index, f"{graph.spec.origin}: remove {index}")
        plan, where = graph.plans[index], f"{graph.at(index)}: cannot be removed"
        if index == graph.head:
            raise UserError(f"{where}: it is the head")
        if len(plan.sources) != 1:
            raise UserError(f"{where}: it joins rows {', '.join(map(str, plan.sources))}, and its readers can read but one")
        source = plan.sources[0]
        width = graph.spec.ch if source == IMAGE else graph.plans[source].out_channels
        if plan.out_channels != width:
            raise UserError(f"{where}: it gives {plan.out_channels} channels where it reads {width}; its readers would not fit")
        if BLOCKS[plan.name].channels is not rules.same_width:
            shapes = shapes or _shapes(graph.spec)
            before, after = (shapes[i][-1] for i in (source, index))
            if before != after:
                raise UserError(f"{where}: it changes the scale by {before / after:g}, and its readers would not fit")
        _bypass(graph, index, where)
        graph.changes.append((f"{plan.name} of row {index} removed", None))


def _bypass(graph: _Graph, index: int, where: str) -> None:
    """Lets the readers of a row read what it reads now, and drops it."""
    (source,) = graph.nodes[index].sources
    readers = [i for i in graph.order if index in graph.nodes[i].sources]
    if source == IMAGE and (len(readers) != 1 or graph.order.index(readers[0]) != 1):
        rows = ", ".join(map(str, readers))
        raise UserError(f"{where}: it reads the image, and so would rows {rows}; only row 0 can")
    for reader in readers:
        graph.nodes[reader].sources = [source if s == index else s for s in graph.nodes[reader].sources]
    graph.order.remove(index)


def _shapes(spec: ModelSpec) -> dict[int, Any]:
    """Output shape of every row, and of the image, in the network's dry run."""
    from models.model import DRY_RUN_SIZE, Model

    shapes = Model(spec).shapes
    return {IMAGE: (1, spec.ch, DRY_RUN_SIZE, DRY_RUN_SIZE), **dict(enumerate(shapes))}


def _renumbered(node: _Node, identity: int, number: Mapping[int, int]) -> Row:
    """The row under its new number; what was written absolute stays so, what was written negative where that still is clearer."""
    here = number[identity]
    written = node.row.source if isinstance(node.row.source, tuple) else (node.row.source,)
    sources = tuple(_written(old, number[s], here) for old, s in zip(written, node.sources))
    return changed(node.row, source=sources if isinstance(node.row.source, tuple) else sources[0])


def _written(old: int, source: int, here: int) -> int:
    if old < 0 and source in (here + old, here - 1):
        return source - here
    return source


def _block(name: str, where: str) -> BlockSpec:
    try:
        return BLOCKS[name]
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]}") from error


def _several(given: Any) -> list[Any]:
    """A list of requests, whether one or several were given."""
    return [given] if isinstance(given, (str, int)) else list(given)
