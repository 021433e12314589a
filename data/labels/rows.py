"""A row of a YOLO label file: the object that it describes, or what is wrong with it. The columns are detection's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

COLUMNS, NOT_A_NUMBER, NOT_FINITE = "wrong columns", "not a number", "not finite"
WRONG_CLASS, OUT_OF_RANGE, NO_AREA = "wrong class", "out of range", "no area"
ROUNDING = 1e-3  # how far outside 0-1 a coordinate may lie and still be clipped: labels are written with few digits
MAX_CLASS = 1_000_000
EXPECTED = "expected: class cx cy w h, or class x1 y1 x2 y2 x3 y3 … (a polygon)"
NO_POLYGON = np.zeros((0, 2))


class LabelRow(NamedTuple):
    """One object, coordinates normalised to 0-1."""

    class_index: int
    box_cxcywh: np.ndarray  # (4,) float64
    polygon: np.ndarray  # (k, 2) float64, empty where there is only a box
    keypoints: np.ndarray | None = None  # (K, 3) float64 of x, y and visibility 0, 1 or 2


class InvalidRow(NamedTuple):
    """What is wrong with a row."""

    message: str
    kind: str
    skips_image: bool = True  # else only the row is dropped


ParseRow = Callable[[Sequence[str]], LabelRow | InvalidRow]


def parse_detection_row(values: Sequence[str]) -> LabelRow | InvalidRow:
    """Reads ``class cx cy w h`` or ``class x1 y1 x2 y2 x3 y3 …``; coordinates just outside 0-1 are clipped.

    Args:
        values: the columns of the row.
    """
    count = len(values)
    if count != 5 and (count < 7 or count % 2 == 0):
        return InvalidRow(f"{count} columns, {EXPECTED}", COLUMNS)
    numbers = _parse_numbers(values)
    if isinstance(numbers, InvalidRow):
        return numbers
    class_index = int(numbers[0])
    if count == 5:
        if not (numbers[3:] > 0).all():
            return InvalidRow("a box without area, dropped", NO_AREA, False)
        return LabelRow(class_index, numbers[1:], NO_POLYGON)
    polygon = numbers[1:].reshape(-1, 2)
    low, high = polygon.min(0), polygon.max(0)
    if not (high - low > 0).all() or len(np.unique(polygon, axis=0)) < 3:
        return InvalidRow("a polygon without area, dropped", NO_AREA, False)
    return LabelRow(class_index, np.concatenate(((low + high) / 2, high - low)), polygon)


def _parse_numbers(values: Sequence[str]) -> np.ndarray | InvalidRow:
    """Class and coordinates (n,) float64, the latter clipped to 0-1."""
    try:
        numbers = np.array(values, np.float64)
    except ValueError:
        return InvalidRow(f"not a number in {' '.join(values)[:60]!r}, {EXPECTED}", NOT_A_NUMBER)
    if not np.isfinite(numbers).all():
        return InvalidRow("NaN or infinity, finite numbers are expected", NOT_FINITE)
    if not 0 <= numbers[0] <= MAX_CLASS or numbers[0] != int(numbers[0]):
        return InvalidRow(f"class {values[0]}, a whole number from 0 is expected", WRONG_CLASS)
    outside = np.flatnonzero((numbers[1:] < -ROUNDING) | (numbers[1:] > 1 + ROUNDING))
    if len(outside):
        column = int(outside[0]) + 1
        return InvalidRow(f"coordinate {values[column]} in column {column + 1}, values normalised to 0-1 are expected", OUT_OF_RANGE)
    numbers[1:] = numbers[1:].clip(0, 1)
    return numbers
