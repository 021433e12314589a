"""Inserting modules behind rows, which keep the width; the readers of a row read the module inserted behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace as changed
from typing import Any

from models.edit.graph import EditGraph, Node, find_block
from models.edit.requests import Insertion, Position, once
from models.spec import channel_rules as rules
from models.spec.parser import Row
from models.spec.planning import plan_row, width_rule
from utils.errors import UserError, nearest

NAMES_WIDTH = (rules.out_width, rules.out_width_repeated)  # of attention that could change the width; inserted, it keeps it


def insert_rows(graph: EditGraph, request: Insertion, *, init: str, removed: Sequence[int]) -> None:
    """Inserts the module behind every row that the request names.

    Args:
        init: ``"identity"`` starts the modules as exact no-ops.
        removed: rows that are to be removed, behind which nothing can stand.

    Raises:
        UserError: the module is unknown, has another rule, or does not fit; or a position does not exist.
    """
    where = f"{graph.spec.origin}: {request.text}"
    block = find_block(request.module, where)
    keeps_width = block.channels is rules.same_width
    if not keeps_width and not (block.kind == "attention" and block.channels in NAMES_WIDTH):
        raise UserError(
            f"{where}: {block.name} chooses its own output (rule {block.channels.__name__!r}); only same-width modules "
            "(rule same_width) can be inserted, others replace a row with --replace"
        )
    args = _with_init(request.args, init)
    for row, auxiliary in _insertion_points(graph, request, where):
        if row in removed:
            raise UserError(f"{where}: row {row} is to be removed; give another row")
        lead = () if keeps_width else (_written_width(graph, row, where),)
        new = Row(row, 1, request.module, (*lead, *args), graph.spec.rows[row].section)
        _check_fits(graph, new, row, where)
        identity = _insert_behind(graph, row, changed(new, source=-1), auxiliary=auxiliary or row not in graph.main)
        graph.changes.append((f"{block.name} inserted behind what was row {row}, as row ", identity))


def _written_width(graph: EditGraph, row: int, where: str) -> int:
    """The width that a row behind this one names to keep its input's, before scaling.

    Raises:
        UserError: scaling gives that width for none.
    """
    channels, width = graph.plans[row].out_channels, width_rule(graph.spec)
    written = round(channels / graph.spec.width) if isinstance(channels, int) else 0
    if written and width(written) == channels:
        return written
    raise UserError(f"{where}: row {row} [{graph.plans[row].name}] has {channels} channels, a width that no row can name")


def _with_init(args: tuple[Any, ...], init: str) -> tuple[Any, ...]:
    """The row's arguments with ``init`` among the options of their last dictionary."""
    if not init:
        return args
    options = dict(args[-1]) if args and isinstance(args[-1], Mapping) else {}
    return (*(a for a in args if not isinstance(a, Mapping)), {**options, "init": init})


def _insert_behind(graph: EditGraph, row: int, new: Row, *, auxiliary: bool) -> int:
    """Chains a node behind those inserted behind ``row`` before; gives its identity."""
    identity = len(graph.nodes)
    before = graph.tails.get((row, False), row)
    graph.nodes[identity] = Node(new, [before])
    graph.order.insert(graph.order.index(before) + 1, identity)
    graph.tails[row, False] = identity
    if auxiliary:
        graph.tails[row, True] = identity
    return identity


def _insertion_points(graph: EditGraph, request: Insertion, where: str) -> list[tuple[int, bool]]:
    """Every row that the positions mean, with whether auxiliary branches read the module too."""
    found = [(row, position.auxiliary) for position in request.positions for row in _resolve(graph, position, where)]
    once([row for row, _ in found], where)
    return found


def _resolve(graph: EditGraph, position: Position, where: str) -> list[int]:
    """Row numbers of ``9``, ``detect``, ``detect.0``, ``backbone.last``, ``backbone.4``, ``head.2``."""
    word, _, part = position.name.partition(".")
    number = int(part) if part.isdecimal() else None
    if word.lstrip("-").isdecimal() and not part:
        rows = [int(word)]
    elif word == "detect" and (number is not None or not part):
        sources = graph.plans[-1].sources
        levels = sources[: len(sources) - getattr(graph.plans[-1].cls, "image_inputs", 0)]
        read = list(dict.fromkeys(s for i, s in enumerate(levels) if position.auxiliary or i in graph.main_inputs))
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


def _check_fits(graph: EditGraph, row: Row, source: int, where: str) -> None:
    """Refuses what the row's rule or the constructor refuses, naming the request."""
    try:
        plan_row(graph.spec, row, len(graph.plans), graph.plans)
    except UserError as error:
        raise UserError(f"{where}: after row {source} [{graph.plans[source].name}]: {error}") from error
