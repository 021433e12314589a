"""Removing rows: the readers of a removed row read what it read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from models.edit.graph import IMAGE, EditGraph
from models.model import DRY_RUN_SIZE, Model
from models.spec import channel_rules as rules
from models.spec.registry import BLOCKS
from utils.errors import UserError


def remove_rows(graph: EditGraph, removed: Sequence[int]) -> None:
    """Removes rows.

    Raises:
        UserError: no such row, the head, a row with several inputs, or one that changes the width or the scale.
    """

    @cache
    def shapes() -> dict[int, Any]:  # built once, and only where a row's rule does not say that the scale stays
        return {IMAGE: (1, graph.spec.ch, DRY_RUN_SIZE, DRY_RUN_SIZE), **dict(enumerate(Model(graph.spec).shapes))}

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
            before, after = (shapes()[i][-1] for i in (source, index))
            if before != after:
                raise UserError(f"{where}: it changes the scale by {before / after:g}, and its readers would not fit")
        _bypass(graph, index, where)
        graph.changes.append((f"{plan.name} of row {index} removed", None))


def _bypass(graph: EditGraph, index: int, where: str) -> None:
    """Redirects the readers of a row to its source, and removes it from the order."""
    (source,) = graph.nodes[index].sources
    readers = [i for i in graph.order if index in graph.nodes[i].sources]
    if source == IMAGE and (len(readers) != 1 or graph.order.index(readers[0]) != 1):
        rows = ", ".join(map(str, readers))
        raise UserError(f"{where}: it reads the image, and so would rows {rows}; only row 0 can")
    for reader in readers:
        graph.nodes[reader].sources = [source if s == index else s for s in graph.nodes[reader].sources]
    graph.order.remove(index)
