"""What can be wrong with a data set: one value for each finding, and the kinds that tables count them by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tasks.base import COLUMNS, NOT_A_NUMBER, NOT_FINITE, OUT_OF_RANGE, WRONG_CLASS

MISSING, CORRUPT, LABEL_FILE = "missing image", "corrupt image", "unreadable labels"
NO_AREA, DUPLICATE_ROWS = "no area", "duplicate rows"
DUPLICATE_IMAGE, LEAK, ORPHAN, ANNOTATIONS = "duplicate image", "in two splits", "labels without image", "annotation file"
KINDS = (
    MISSING, CORRUPT, LABEL_FILE, COLUMNS, NOT_A_NUMBER, NOT_FINITE, WRONG_CLASS, OUT_OF_RANGE, NO_AREA, DUPLICATE_ROWS, DUPLICATE_IMAGE,
    LEAK, ORPHAN, ANNOTATIONS,
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
        """With what it cost."""
        return f"{'left out: ' if self.skips else ''}{self}"


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """All of them as a text file, one a line.

    Raises:
        OSError: It cannot be written.
    """
    path.write_text("".join(f"{p.line()}\n" for p in problems), encoding="utf-8", errors="surrogateescape")
