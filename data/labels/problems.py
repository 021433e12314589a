"""What can be wrong with a data set: one value for each problem, and the kinds that tables count them by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tasks.rows import COLUMNS, NO_AREA, NOT_A_NUMBER, NOT_FINITE, OUT_OF_RANGE, WRONG_CLASS

MISSING, CORRUPT, LABEL_FILE = "missing image", "corrupt image", "unreadable labels"
DUPLICATE_ROWS, DUPLICATE_IMAGE, LEAK = "duplicate rows", "duplicate image", "in two splits"
ORPHAN, ANNOTATIONS, NO_LABELS, OUTLINE = "labels without image", "annotation file", "no labels", "wrong outline"
KINDS = (
    MISSING, CORRUPT, LABEL_FILE, COLUMNS, NOT_A_NUMBER, NOT_FINITE, WRONG_CLASS, OUT_OF_RANGE, NO_AREA, DUPLICATE_ROWS, DUPLICATE_IMAGE,
    LEAK, ORPHAN, ANNOTATIONS, NO_LABELS, OUTLINE,
)  # fmt: skip


class Problem(NamedTuple):
    """One thing wrong with the data."""

    path: str
    row: int  # from 1; 0 when it is about the whole file
    message: str
    skips: bool  # whether the image was left out
    kind: str = ""  # of KINDS

    def __str__(self) -> str:
        return f"{self.path}:{self.row}: {self.message}" if self.row else f"{self.path}: {self.message}"

    def line(self) -> str:
        """The problem, and whether the image was left out for it."""
        return f"{'left out: ' if self.skips else ''}{self}"


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Writes all problems into a text file, one a line.

    Raises:
        OSError: it cannot be written.
    """
    path.write_text("".join(f"{p.line()}\n" for p in problems), encoding="utf-8", errors="surrogateescape")
