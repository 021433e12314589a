"""DOTA's text labels: one file for an image, a row ``x1 y1 x2 y2 x3 y3 x4 y4 class difficult`` in px for each object, after two header
lines (``imagesource:``, ``gsd:``), which may be missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.labels.checks import drop_duplicates
from data.labels.problems import COLUMNS, LABEL_FILE, WRONG_CLASS, Problem
from data.labels.table import ImageLabels
from data.labels.tree import walk_tree
from tasks import OBB
from tasks.rows import InvalidRow, LabelRow
from utils.errors import UserError
from utils.files import read_bounded
from utils.reading.limits import MAX_LABEL_BYTES

HEADERS = ("imagesource:", "gsd:", "acquisition dates:")
EXPECTED = "x1 y1 x2 y2 x3 y3 x4 y4 class difficult"
COORDINATES = 8
DIFFICULT = ("1", "2")


@dataclasses.dataclass(frozen=True)
class DotaFile:
    """The content of a label file.

    Attributes:
        path: the file.
        labels: class names, one for each object.
        rows: of the objects in the file, from 1.
        corners: (n, 4, 2) px.
        difficult: objects left out because they are marked so.
        problems: what is wrong.
    """

    path: Path
    labels: tuple[str, ...]
    rows: tuple[int, ...]
    corners: np.ndarray
    difficult: int
    problems: tuple[Problem, ...]

    def numbered(self, names: Sequence[str], hw: tuple[int, int]) -> ImageLabels:
        """With class numbers and normalised corners, checked as rows of label files are.

        Args:
            names: classes in order; a name that is not among them leaves the image out.
            hw: height and width of the image in px.
        """
        found: list[LabelRow] = []
        numbers: list[int] = []
        problems = list(self.problems)
        for label, number, corners in zip(self.labels, self.rows, self.corners / np.array(hw[::-1])):
            wrong = InvalidRow(f"class {label!r} is not among --names", WRONG_CLASS) if label not in names else None
            row = wrong or OBB.parse_row([str(names.index(label)), *map(repr, corners.ravel().tolist())])
            if isinstance(row, InvalidRow):
                problems.append(Problem(str(self.path), number, row.message, row.skips_image, row.kind))
            else:
                found.append(row)
                numbers.append(number)
        if any(p.skips for p in problems):
            return ImageLabels.unusable(*problems, has_label_file=True)
        labels = ImageLabels(
            hw, True,
            np.array([row.class_index for row in found], np.int64),
            np.array([row.box_cxcywh for row in found], np.float32).reshape(-1, 4),
            np.array(numbers, np.int64),
            np.concatenate([np.zeros((0, 2)), *(row.polygon for row in found)]).astype(np.float32),
            np.array([len(row.polygon) for row in found], np.int64),
            tuple(problems),
        )  # fmt: skip
        return drop_duplicates(labels, str(self.path))


def dota_files(source: Path) -> list[Path]:
    """The text files of a folder, with everything below it, or the file itself.

    Raises:
        UserError: there is none.
    """
    tree = [] if source.is_file() else walk_tree(source)
    found = sorted(Path(top, name) for top, names, _ in tree for name in names if name.lower().endswith(".txt"))
    found = [source] if source.is_file() else found
    if not found:
        raise UserError(f"{source}: no .txt file; a folder of DOTA's label files (labelTxt) is expected")
    return found


def read_dota(path: Path, *, difficult: bool) -> DotaFile:
    """Reads one file. Nothing wrong with it raises: it is in ``problems``."""
    try:
        text = read_bounded(path, limit=MAX_LABEL_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not a text file in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error.strerror or error)
        return DotaFile(path, (), (), np.zeros((0, 4, 2)), 0, (Problem(str(path), 0, reason, True, LABEL_FILE),))
    labels, rows, corners, left_out = [], [], [], 0
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), start=1):
        columns = line.split()
        if not columns or (number <= len(HEADERS) and line.strip().lower().startswith(HEADERS)):
            continue
        found = _object(columns)
        if isinstance(found, str):
            problems.append(Problem(str(path), number, found, True, COLUMNS))
        elif not difficult and columns[COORDINATES + 1 :] and columns[-1] in DIFFICULT:
            left_out += 1
        else:
            labels.append(columns[COORDINATES])
            rows.append(number)
            corners.append(found)
    return DotaFile(path, tuple(labels), tuple(rows), np.array(corners).reshape(-1, 4, 2), left_out, tuple(problems))


def _object(columns: Sequence[str]) -> list[float] | str:
    """The coordinates of a row in px, or what is wrong with it."""
    if len(columns) not in (COORDINATES + 1, COORDINATES + 2):
        return f"{len(columns)} columns, expected: {EXPECTED}"
    try:
        values = [float(value) for value in columns[:COORDINATES]]
    except ValueError:
        return f"not a number in {' '.join(columns)[:60]!r}, expected: {EXPECTED}"
    return values if np.isfinite(values).all() else f"NaN or infinity in {' '.join(columns)[:60]!r}, expected: {EXPECTED}"
