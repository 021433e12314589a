"""What a user writes to edit a network, ``FocalModulation@9`` or ``C2f=C2f_EMA@6,8``, as values; nothing in the text is ever run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError

INSERTION = re.compile(r"^(?P<module>[\w.]+)@(?P<where>[\w.,+\- ]+?)(?:\((?P<args>.*)\))?$")
REPLACEMENT = re.compile(r"^(?P<old>[\w.]+)=(?P<new>[\w.]+)(?:@(?P<rows>[\d, ]+))?(?:\((?P<args>.*)\))?$")
AUXILIARY = "+aux"


@dataclass(frozen=True)
class Position:
    """A place after which a module is put: a row number or a word, and whether auxiliary branches read the module too."""

    name: str
    auxiliary: bool


@dataclass(frozen=True)
class Insertion:
    """``module@positions(args)``; ``args`` are a row's arguments, options in a dictionary at the end."""

    text: str
    module: str
    positions: tuple[Position, ...]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Replacement:
    """``old=new@rows(args)``; no rows means every row of the old module, no brackets (None) the row's own arguments."""

    text: str
    old: str
    new: str
    rows: tuple[int, ...]
    args: tuple[Any, ...] | None


def read_insertion(text: str) -> Insertion:
    """Reads ``FocalModulation@9``, ``EMA@4,6,detect``, ``BiLevelRoutingAttention@9+aux(n_win=8, topk=4)``.

    Raises:
        UserError: another form, or arguments that are no literals.
    """
    match = INSERTION.match(text.strip())
    if match is None:
        raise UserError(f"{text!r}: should be MODULE@ROW such as FocalModulation@9, EMA@4,6,9, EMA@detect or EMA@9(factor=8)")
    positions = tuple(_position(part.strip(), text) for part in match["where"].split(","))
    return Insertion(text, match["module"], positions, _arguments(match["args"], text))


def read_replacement(text: str) -> Replacement:
    """Reads ``C2f=C2f_EMA@6,8``, ``SPPF=SPPELAN(1024, 512)``. Raises UserError as :func:`read_insertion` does."""
    match = REPLACEMENT.match(text.strip())
    if match is None:
        raise UserError(f"{text!r}: should be OLD=NEW@ROWS such as C2f=C2f_EMA@6,8; without rows every row of the old module is meant")
    rows = read_rows([match["rows"]]) if match["rows"] else ()
    args = None if match["args"] is None else _arguments(match["args"], text)
    return Replacement(text, match["old"], match["new"], rows, args)


def read_rows(texts: Iterable[str | int]) -> tuple[int, ...]:
    """Row numbers from ``["10", "12,13"]``. Raises UserError for what is no row number, or one given twice."""
    parts = [part.strip() for text in texts for part in str(text).split(",")]
    for part in parts:
        if not part.isdecimal():
            raise UserError(f"{part!r} is no row number; rows count from 0 over backbone and head")
    return once([int(part) for part in parts], ",".join(parts))


def once(rows: list[int], text: str) -> tuple[int, ...]:
    """The rows, each of which may be named but once."""
    twice = {row for row in rows if rows.count(row) > 1}
    if twice:
        raise UserError(f"{text}: row {min(twice)} is named twice")
    return tuple(rows)


def _position(part: str, text: str) -> Position:
    name = part.removesuffix(AUXILIARY)
    if not name or "+" in name:
        raise UserError(f"{text!r}: {part!r} is no position; a row number, detect, backbone.last are, each also with {AUXILIARY}")
    return Position(name, part.endswith(AUXILIARY))


def _arguments(text: str | None, whole: str) -> tuple[Any, ...]:
    """``8, n_win=7`` as a row's arguments: positional ones, then a dictionary of options."""
    if not text or not text.strip():
        return ()
    try:
        call = ast.parse(f"_({text})", mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        call = None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise UserError(f"{whole!r}: the arguments cannot be read; write them as in EMA@9(factor=8)")
    positional = [_value(node, whole) for node in call.args]
    options = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise UserError(f"{whole!r}: ** is not understood; write every option by name")
        options[keyword.arg] = _value(keyword.value, whole)
    return (*positional, options) if options else tuple(positional)


def _value(node: ast.expr, whole: str) -> Any:
    """A literal; a bare word or a dotted call stays text, which the row's reader checks against its allow-list."""
    try:
        return _plain(ast.literal_eval(node))
    except (ValueError, TypeError, MemoryError, RecursionError):
        pass
    if isinstance(node, (ast.Name, ast.Attribute, ast.Call)):
        return ast.unparse(node)
    raise UserError(f"{whole!r}: {ast.unparse(node)!r} is neither a number, a word nor a list of them; nothing in it is computed")


def _plain(value: Any) -> Any:
    """Lists for tuples, so that a YAML can hold it."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is not None and not isinstance(value, (int, float, str, bool)):
        raise ValueError
    return value
