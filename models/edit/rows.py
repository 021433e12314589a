"""Editing a network's rows: insert modules that keep the width, replace modules, remove rows; every ``from`` follows by itself.

    python -m models.edit yolov9-c.yaml --insert FocalModulation@9 --init identity --show --out mine.yaml

All positions, of several edits too, are those of the network before any edit. After an insertion every reader of the row reads the
inserted module, in the backbone, the neck and the head alike, with one exception: auxiliary branches, which deploying drops, still
read the plain row, as in the variants of YOLOv9 (their gradient reaches the backbone past the module). ``@9+aux`` lets them read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.edit.graph import Edited, EditGraph
from models.edit.insertion import insert_rows
from models.edit.removal import remove_rows
from models.edit.replacement import replace_rows
from models.edit.requests import read_insertion, read_replacement, read_rows
from models.spec.parser import ModelSpec
from utils.errors import UserError

__all__ = ["Edited", "edit"]
INITS = ("", "identity")


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
            positional arguments in brackets, or empty brackets, replace all of them; options are added.
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
    graph = EditGraph.of(spec)
    removed = read_rows(_as_list(remove))
    replacements = [read_replacement(text) for text in _as_list(replace)]
    for request in replacements:
        replace_rows(graph, request, removed=removed)
    for text in _as_list(insert):
        insert_rows(graph, read_insertion(text), init=init, removed=removed)
    graph.reroute()
    if removed:
        remove_rows(graph, removed)
    return graph.edited()


def _as_list(given: Any) -> list[Any]:
    """A list of requests, whether one or several were given."""
    return [given] if isinstance(given, (str, int)) else list(given)
