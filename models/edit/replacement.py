"""Replacing the modules of rows; arguments are kept where they mean the same in the new module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace as changed
from typing import Any

from models.edit.graph import EditGraph, find_block
from models.edit.requests import Replacement
from models.spec import channel_rules as rules
from models.spec.planning import plan_row
from models.spec.registry import BLOCKS, BlockSpec
from utils.errors import UserError, nearest

# rule -> (leading arguments of a row that are its width, parameters of the constructor that the rule fills in)
LAYERED: dict[Any, tuple[int, int]] = {
    rules.out_width: (1, 2), rules.out_width_repeated: (1, 3), rules.same_width: (0, 1), rules.keep_width: (0, 0),
}  # fmt: skip


def replace_rows(graph: EditGraph, request: Replacement, *, removed: Sequence[int]) -> None:
    """Replaces the module of every row that the request names, or of all rows of the old module.

    Raises:
        UserError: no such row, another edit changes it, too, or its arguments do not fit the new module.
    """
    where = f"{graph.spec.origin}: {request.text}"
    old, matching = _rows_of_module(graph, request.old, where)
    block = find_block(request.new, where)
    for index in request.rows or matching:
        graph.check_row(index, where)
        if index not in matching:
            rows = ", ".join(map(str, matching)) or "no row"
            raise UserError(f"{where}: row {index} is {graph.plans[index].name}, not {request.old}, which is at {rows}")
        if index in removed or index in graph.replaced:
            raise UserError(f"{where}: row {index} is removed or replaced by another edit, too")
        _replace_row(graph, index, block, request)
        graph.changes.append((f"{old} replaced by {block.name} in row ", index))
    if not matching:
        raise UserError(f"{where}: no row is {request.old}")


def _rows_of_module(graph: EditGraph, module: str, where: str) -> tuple[str, list[int]]:
    """The registered name of a module and the rows that hold it, perhaps none. Raises UserError for a name that nothing has."""
    names = {plan.name for plan in graph.plans} | {row.module for row in graph.spec.rows}
    if module not in names and module not in BLOCKS:
        raise UserError(f"{where}: no row is {module!r}; {nearest(module, names)}".rstrip("; "))
    name = BLOCKS[module].name if module in BLOCKS else module
    return name, [plan.index for plan in graph.plans if plan.name == name]


def _replace_row(graph: EditGraph, index: int, block: BlockSpec, request: Replacement) -> None:
    where = f"{graph.spec.origin}: {request.text}: row {index}"
    row = changed(graph.spec.rows[index], module=request.new, args=_new_args(graph, index, block, request, where))
    try:
        plan_row(graph.spec, row, index, graph.plans)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    graph.nodes[index].row = row
    graph.replaced.append(index)


def _new_args(graph: EditGraph, index: int, block: BlockSpec, request: Replacement, where: str) -> tuple[Any, ...]:
    """The arguments of the new row: those given, or the old row's where the new module has parameters of these names."""
    row = graph.spec.rows[index]
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
        _check_names(old, block, positional[lead:], where)
    return (*positional, kept_options) if kept_options else tuple(positional)


def _check_names(old: BlockSpec, new: BlockSpec, args: Sequence[Any], where: str) -> None:
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
