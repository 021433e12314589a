"""What a hand that writes YAML gets wrong, named by its line: full-width punctuation, tabs, a missing space."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LOOKALIKES = "：:，,、,；;［[］]【[】]｛{｝}＃#－-“\"”\"‘'’'\u3000 \u00a0 "  # each before what it stands for
PUNCTUATION = dict(zip(_LOOKALIKES[::2], _LOOKALIKES[1::2]))
SEPARATORS = "：，"  # inside an unquoted text they were meant to end it
_QUOTED = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^']|'')*'""")
_COMMENT = re.compile(r"(?:^|\s)#.*")
_TIGHT_COLON = re.compile(r"^\s*(?:- +)?[{\[]?(?P<key>[\w.-]+):(?!//|\\|\s|$)(?P<value>\S+)")
_TIGHT_DASH = re.compile(r"^\s*-(?P<item>[^\W\d][^\s:]*)\s*$")


def advice(lines: Sequence[str], *, last: int) -> str:
    """What is probably wrong in the lines up to ``last`` (from 0), such as ``line 3: …``; empty where nothing is suspicious."""
    for number, line in enumerate(lines[: last + 1], 1):
        if fault := line_fault(line):
            return f"line {number}: {fault}"
    return ""


def line_fault(line: str) -> str:
    """The same for one line, without its number."""
    indent = line[: len(line) - len(line.lstrip())]
    if "\t" in indent:
        return "begins with a tab; YAML is indented with spaces"
    bare = _COMMENT.sub("", _QUOTED.sub("''", line))
    for character in bare:
        if character in PUNCTUATION:
            return wrong_character(character)
    if (found := _TIGHT_COLON.match(bare)) and not (len(found["key"]) == 1 and found["value"].startswith("/")):
        return f"{found['key'][:40]}:{found['value'][:40]} needs a space after the colon"
    if found := _TIGHT_DASH.match(bare):
        return f"-{found['item'][:40]} needs a space after the dash"
    return ""


def wrong_character(character: str) -> str:
    """Names a character that looks like YAML's punctuation and is another one."""
    shown = f"{character!r} (U+{ord(character):04X})" if character.strip() else f"a space of another kind (U+{ord(character):04X})"
    return f"{shown} stands where {PUNCTUATION[character]!r} is expected; or put the text in quotes"
