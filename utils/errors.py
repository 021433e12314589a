"""The one exception for what a user can cause: it carries one clear line, and scripts print it without a traceback."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

PLUGIN_PREFIX = "yolo_plugin_"  # of the names under which users' files are imported


class UserError(ValueError):
    """Bad input. The message is one line: which file, which row or key, which value, and what would be right."""


def nearest(name: str, known: Iterable[str], *, count: int = 1) -> str:
    """The known names closest to ``name`` as a phrase such as ``did you mean 'CBAM'?``; empty if none is close."""
    close = closest(name, known, count=count)
    return "did you mean " + " or ".join(repr(c) for c in close) + "?" if close else ""


def nearest_file(path: Path, folder: Path) -> str:
    """The YAML file of a folder whose name is closest to that of a path, as a phrase; all its files where none is close."""
    known = {p.stem: p.name for p in sorted(folder.glob("*.yaml"))}  # all share the suffix
    close = closest(path.stem if path.suffix in (".yaml", ".yml") else path.name, known)
    return f"did you mean {known[close[0]]!r}?" if close else f"known names: {', '.join(known.values())}"


def closest(name: str, known: Iterable[str], *, count: int = 1) -> list[str]:
    """The known names closest to ``name``, letter case aside, best first: those with two neighbouring letters exchanged first."""
    by_lower = {k.lower(): k for k in known}
    given = name.lower()
    exchanged = [k for i in range(len(given) - 1) if (k := given[:i] + given[i + 1] + given[i] + given[i + 2 :]) in by_lower and k != given]
    permuted = [k for k in by_lower if k != given and sorted(k) == sorted(given)]
    near = difflib.get_close_matches(given, by_lower, n=count + len(permuted), cutoff=0.55)
    others = sorted(dict.fromkeys([*permuted, *near]), key=lambda k: -difflib.SequenceMatcher(None, k, given).ratio())
    return [by_lower[m] for m in dict.fromkeys([*exchanged, *others])][:count]


def first_line(error: BaseException) -> str:
    """What another library says about an error, short enough to be quoted in a message of one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def last_line(error: BaseException) -> str:
    """The same of a library whose message begins with a traceback."""
    return next(reversed(str(error).strip().splitlines()), type(error).__name__)[:200]


def place_in_plugin(error: BaseException) -> str:
    """Where in a user's file an error was raised, such as ``my_blocks.py, line 12``; empty where it was none."""
    files = {getattr(m, "__file__", ""): Path(str(m.__file__)).name for n, m in list(sys.modules.items()) if n.startswith(PLUGIN_PREFIX)}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{files[frames[-1].filename]}, line {frames[-1].lineno}" if frames else ""


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
