"""Tables as text: aligned columns for a terminal, Markdown, and what a cell of a CSV file may be."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def text_table(lines: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Lines of cells as columns two spaces apart, each as wide as its widest cell.

    Args:
        lines: the header and the rows, of one number of cells.
        right: columns that are aligned to the right, such as numbers.
    """
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; cells must not hold an unescaped ``|``."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def counted(count: int, noun: str) -> str:
    """A number of things in words: ``1 seed``, ``3 seeds``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file. A spreadsheet takes a text that begins with ``=``, ``+``, ``-`` or ``@`` as a formula and runs it, so that
    such a text gets an apostrophe in front; what is a number stays as it is."""
    formula = isinstance(value, str) and value.startswith(FORMULA_STARTS) and not _is_number(value)
    return f"'{value}" if formula else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
