"""Names from files (classes, images, variants) as images and plots show them: one line of limited length, and no formula."""

from __future__ import annotations

import unicodedata
from itertools import accumulate

FIGURE_FORMATS = ("pdf",)  # what ``--plots`` adds to the .png of every curve and matrix
LONGEST_NAME = 40  # columns of a name in a figure or on an image


def short_name(name: str, *, most: int = LONGEST_NAME) -> str:
    """The start and the end of a very long name; nothing in it breaks the line or the font.

    Args:
        most: columns that it may take; Chinese, Japanese and Korean characters take two.
    """
    if sum(map(_columns, name[: most + 1])) > most:
        name = f"{_start(name, most // 2)}…{_start(name[::-1], most - most // 2 - 1)[::-1]}"
    return name if name.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def shown_name(name: str, *, most: int = LONGEST_NAME) -> str:
    """A name as matplotlib shows it: ``short_name``, in which a dollar sign begins no formula."""
    return short_name(name, most=most).replace("$", r"\$")


def _start(name: str, most: int) -> str:
    """As many characters as fit into so many columns."""
    ends = accumulate(map(_columns, name[:most]))
    return name[: sum(end <= most for end in ends)]


def _columns(c: str) -> int:
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1
