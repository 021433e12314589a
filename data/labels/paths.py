"""Paths as they are written: absolute and without dots, but links are not followed, because labels are found by the names in a path."""

from __future__ import annotations

import os
from pathlib import Path


def as_written(path: str | Path) -> Path:
    """An absolute path without ``.`` and ``..``, which are removed as text.

    Only where that does not exist, a link in front of ``..`` is followed, as the operating system would.
    """
    absolute = Path(os.path.join(os.getcwd(), path))
    if ".." not in absolute.parts:
        return absolute
    plain = os.path.normpath(absolute)
    if os.path.lexists(plain):
        return Path(plain)
    found = absolute.anchor
    for part in absolute.parts[1:]:
        if part != "..":
            found = os.path.join(found, part)
        else:
            found = os.path.dirname(os.path.realpath(found) if os.path.islink(found) else found)
    return Path(found if os.path.lexists(found) else plain)
