"""The one reader of YAML: bounded in size, depth and count, plain types, no key twice; every config file goes through it.

Nothing in a file is run, and nothing is built that is larger than the file allows for: aliases count with all that they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.reading.limits import MAX_YAML_BYTES, MAX_YAML_DEPTH, MAX_YAML_VALUES, brief
from utils.reading.text_files import REPLACED, decode, read_bytes
from utils.reading.yaml_advice import SEPARATORS, advice, line_fault, wrong_character
from utils.reading.yaml_scalars import ScalarError, check_text, control_character, scalar_value, shown_tag

SHOWN = 80  # characters of a value in a message
_PARSER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # libyaml is ten times as fast
_COLLECTION_TAGS = {None, "!", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"}


def read_yaml(path: str | Path, *, as_written: Collection[str] = (), expected: str = "keys and values") -> dict[str, Any]:
    """A YAML file whose top level is a mapping; an empty file is an empty mapping.

    Args:
        as_written: keys of the top level below which every value is the text that was written: ``no`` and ``010`` are names there, not
            False and 8. An empty value is None.
        expected: what the file should hold, for messages.

    Raises:
        UserError: missing, unreadable, too large, no YAML, no mapping, a key twice, a type that is not read; the line is named.
    """
    content = read_bytes(path, most=MAX_YAML_BYTES, kind="YAML file")
    loaded = parse_yaml(decode(content), source=str(path), as_written=as_written, expected=expected)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: a mapping of {expected} is expected, not {type(loaded).__name__} {shown(loaded)}")
    return loaded


def parse_yaml(text: str, *, source: str, as_written: Collection[str] = (), expected: str = "keys and values") -> Any:
    """The value of a YAML text: None, text, numbers, booleans, lists, and dictionaries whose keys are text.

    Args:
        source: what messages call it; the other arguments are those of :func:`read_yaml`.

    Raises:
        UserError: as :func:`read_yaml`.
    """
    lines = re.split(r"\r\n|\r|\n", text)
    for number, line in enumerate(lines, 1):
        if fault := control_character(line):
            hint = " (UTF-16 without a byte-order mark?); save the file as UTF-8" if "\0" in line else ""
            raise UserError(f"{source}: line {number}: {fault}{hint}")
    builder = _Builder(text, lines, frozenset(as_written))
    try:
        value = builder.build()
        if isinstance(value, str) and (found := advice(lines, last=len(lines))):
            raise _PlacedError(found)
    except _LimitError as error:
        raise UserError(f"{source}: {error}") from None
    except _PlacedError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: {_syntax_fault(error, lines)}") from None
    return value


def shown(value: Any) -> str:
    """A value for a message: its repr, cut; big containers are not printed whole to be cut."""
    if isinstance(value, str):
        text = repr(value[: SHOWN + 1])
    elif isinstance(value, list):
        text = f"[{', '.join(shown(v) for v in value[:8])}{', …' if len(value) > 8 else ''}]"
    elif isinstance(value, dict):
        inner = ", ".join(f"{shown(k)}: {shown(v)}" for k, v in list(value.items())[:8])
        text = f"{{{inner}{', …' if len(value) > 8 else ''}}}"
    else:
        text = brief(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


class _PlacedError(Exception):
    """What is wrong, with its line."""

    @classmethod
    def at(cls, event: Any, what: str) -> _PlacedError:
        return cls(f"line {event.start_mark.line + 1}: {what}")


class _LimitError(_PlacedError):
    """A file that goes beyond a limit, with the line where it does."""


def _syntax_fault(error: yaml.YAMLError, lines: list[str]) -> str:
    mark = getattr(error, "problem_mark", None)
    last = mark.line if mark else len(lines)
    if broken := next((n for n, line in enumerate(lines, 1) if REPLACED in line.split(" #")[0] and not line.lstrip().startswith("#")), 0):
        return f"line {broken}: is not UTF-8 text (GBK or another code page?); save the file as UTF-8"
    if found := advice(lines, last=last):
        return f"not valid YAML: {found}"
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    said = ", ".join(str(part) for part in (getattr(error, "problem", None), getattr(error, "context", None)) if part)
    return f"not valid YAML: {place}{said or str(error).splitlines()[0]}"


class _Builder:
    """Makes the value of one text from the parser's events; stops at the first that goes beyond a limit.

    Each ``_…`` that builds returns the value and the number of values in it.
    """

    def __init__(self, text: str, lines: list[str], as_written: frozenset[str]) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=_PARSER)
        self.lines, self.as_written = lines, as_written
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.count = 0

    def build(self) -> Any:
        value, seen = None, False
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if seen:
                    raise _PlacedError.at(event, "a second document begins (---); a file holds one")
                value, seen = self._value(next(self.events), depth=1), True
        return value

    def _value(self, event: Any, *, depth: int, written: bool = False, in_flow: bool = False) -> Any:
        before = self.count
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        self._add(event, 1)
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, written=written, is_item=in_flow or (written and depth > 2))
        else:
            if depth > MAX_YAML_DEPTH:
                raise _LimitError.at(event, f"more than {MAX_YAML_DEPTH} lists and mappings inside one another")
            if event.tag not in _COLLECTION_TAGS:
                raise _PlacedError.at(event, f"the tag {shown_tag(event.tag)} is not read here; write the value without it")
            build = self._list if isinstance(event, yaml.SequenceStartEvent) else self._mapping
            value = build(event, depth=depth, written=written)
        if event.anchor:
            self.anchors[event.anchor] = value, self.count - before
        return value

    def _add(self, event: Any, count: int) -> None:
        self.count += count
        if self.count > MAX_YAML_VALUES:
            raise _LimitError.at(event, f"more than {MAX_YAML_VALUES:,} values, aliases counted with all that they stand for")

    def _alias(self, event: Any) -> Any:
        if event.anchor not in self.anchors:
            raise _PlacedError.at(event, f"the alias *{event.anchor[:40]} stands for nothing that ends before it")
        value, count = self.anchors[event.anchor]
        self._add(event, count)
        return value

    def _list(self, start: Any, *, depth: int, written: bool) -> list[Any]:
        values = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            values.append(self._value(event, depth=depth + 1, written=written, in_flow=bool(start.flow_style)))
        return values

    def _mapping(self, start: Any, *, depth: int, written: bool) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: list[Any] = []
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._key(event)
            if key in lines:
                raise _PlacedError.at(event, f"the key {shown(key)} stands in line {lines[key]} already")
            lines[key] = event.start_mark.line + 1
            inside = written or (depth == 1 and key in self.as_written)
            following = next(self.events)
            if start.flow_style and ":" in key and _is_plain(event) and _is_empty(following):
                raise _PlacedError.at(event, f"{key[:80]} needs a space after the colon")
            value = self._value(following, depth=depth + 1, written=inside, in_flow=bool(start.flow_style))
            if key == "<<" and _is_plain(event):
                merged += value if isinstance(value, list) else [value]
                if not all(isinstance(m, dict) for m in merged):
                    raise _PlacedError.at(event, "<< takes a mapping or a list of them")
            else:
                values[key] = value
        for mapping in merged:
            self._add(start, len(mapping))
            values = {**mapping, **values}
        return values

    def _key(self, event: Any) -> str:
        """A key is text, as it was written; ``0`` and ``no`` are too."""
        if isinstance(event, yaml.AliasEvent):
            key = self._alias(event)
        elif isinstance(event, yaml.ScalarEvent):
            self._add(event, 1)
            key = self._scalar(event, written=True, is_item=True)
            if event.anchor:
                self.anchors[event.anchor] = key, 1
        else:
            raise _PlacedError.at(event, "a key is a text, not a list or a mapping")
        return key if isinstance(key, str) else "" if key is None else str(key)

    def _scalar(self, event: Any, *, written: bool, is_item: bool) -> Any:
        is_plain = _is_plain(event)
        try:
            check_text(event.value)
            if is_plain and is_item and (found := next((c for c in event.value if c in SEPARATORS), "")):
                raise ScalarError(wrong_character(found))
            if is_plain and written:
                self._check_is_one_line(event)
            if written and event.tag is None:
                return event.value or (None if is_plain else "")
            return scalar_value(event.value, tag=event.tag, is_plain=is_plain)
        except ScalarError as error:
            raise _PlacedError.at(event, str(error)) from None

    def _check_is_one_line(self, event: Any) -> None:
        """Refuses names that a missing space made one text of several lines."""
        first, last = event.start_mark.line, event.end_mark.line
        for number, line in enumerate(self.lines[first : last + 1] if first != last else [], first + 1):
            if fault := line_fault(line):
                raise _PlacedError(f"line {number}: {fault}")


def _is_plain(event: Any) -> bool:
    return event.style not in ("'", '"', "|", ">")


def _is_empty(event: Any) -> bool:
    return isinstance(event, yaml.ScalarEvent) and not event.value and _is_plain(event)
