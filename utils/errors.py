"""The one exception for what a user can cause: it carries one clear line, and scripts print it without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line: which file, which row or key, which value, and what would be right."""


def nearest(name: str, known: Iterable[str], *, count: int = 1) -> str:
    """The known names closest to ``name`` as a phrase such as ``did you mean 'CBAM'?``; empty if none is close."""
    close = closest(name, known, count=count)
    return "did you mean " + " or ".join(repr(c) for c in close) + "?" if close else ""


def closest(name: str, known: Iterable[str], *, count: int = 1) -> list[str]:
    """The known names closest to ``name``, letter case aside, best first: those of the same letters in another order before all others."""
    by_lower = {k.lower(): k for k in known}
    permuted = [k for k in by_lower if k != name.lower() and sorted(k) == sorted(name.lower())]
    near = difflib.get_close_matches(name.lower(), by_lower, n=count + len(permuted), cutoff=0.55)
    return [by_lower[m] for m in dict.fromkeys([*permuted, *near])][:count]


def first_line(error: BaseException) -> str:
    """What another library says about an error, short enough to be quoted in a message of one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def last_line(error: BaseException) -> str:
    """The same of a library whose message begins with a traceback."""
    return next(reversed(str(error).strip().splitlines()), type(error).__name__)[:200]


def one_line(text: str, *, most: int = 4000) -> str:
    """A message as one line that a terminal shows as it is: line ends become blanks, control characters are escaped, the end is cut."""
    joined = " ".join(line.strip() for line in text[: 4 * most].splitlines()).strip()
    safe = printable(joined)
    return safe if len(safe) <= most else safe[:most] + " …"


def printable(text: str) -> str:
    """Text from a file for a terminal or a log: one line, without control characters, escape sequences or lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text)
