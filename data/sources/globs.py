"""Patterns with ``**``, which the standard library would follow round in circles of links for ever."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Sequence

from data.labels.tree import walk_tree

ANY_DEPTH = "**"


def match_files(pattern: str) -> list[str]:
    """What a pattern matches, sorted; with ``**``, files alone, each folder once, and nothing whose name begins with a dot."""
    parts = pattern.split("/") if os.sep == "/" else pattern.replace(os.sep, "/").split("/")
    if ANY_DEPTH not in parts:
        return sorted(glob.glob(pattern))
    first = parts.index(ANY_DEPTH)
    start, rest = "/".join(parts[:first]), _without_repeats(parts[first:])
    tops = glob.glob(start) if start else ["/" if first else ""]
    found = []
    for top in filter(os.path.isdir, [t or "." for t in tops]):
        shown = "" if top == "." and not start else top
        for folder, names, _ in walk_tree(top):
            inside = [p for p in os.path.relpath(folder, top).split(os.sep) if p != "."]
            found += [os.path.join(shown, *inside, name) for name in names if _matches([*inside, name], rest)]
    return sorted(found)


def _without_repeats(parts: Sequence[str]) -> list[str]:
    """One ``**`` for several in a row."""
    return [p for i, p in enumerate(parts) if p != ANY_DEPTH or i == 0 or parts[i - 1] != ANY_DEPTH]


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the names of a path match the parts of a pattern; the time is that of their product."""
    reached = {0}  # parts that the names so far may have used up
    for name in names:
        reached |= {k + 1 for k in reached if k < len(parts) and parts[k] == ANY_DEPTH}
        advanced = {k for k in reached if k < len(parts) and parts[k] == ANY_DEPTH and not name.startswith(".")}
        advanced |= {k + 1 for k in reached if k < len(parts) and parts[k] != ANY_DEPTH and _matches_one(name, parts[k])}
        reached = advanced
    reached |= {k + 1 for k in reached if k < len(parts) and parts[k] == ANY_DEPTH}
    return len(parts) in reached


def _matches_one(name: str, part: str) -> bool:
    return fnmatch.fnmatch(name, part) and (part.startswith(".") or not name.startswith("."))
