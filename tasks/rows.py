"""A row of a label file: the object that it describes, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

COLUMNS, NOT_A_NUMBER, NOT_FINITE = "wrong columns", "not a number", "not finite"
WRONG_CLASS, OUT_OF_RANGE, NO_AREA = "wrong class", "out of range", "no area"
ROUNDING = 1e-3  # how far outside 0-1 a coordinate may lie and still be clipped: labels are written with few digits
MAX_CLASS = 1_000_000
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


def parse_numbers(values: Sequence[str], expected: str, *, limited: bool = True) -> np.ndarray | InvalidRow:
    """Class and coordinates (n,) float64, the latter clipped to 0-1, or as they are unless ``limited``."""
    try:
        numbers = np.array(values, np.float64)
    except ValueError:
        return InvalidRow(f"not a number in {' '.join(values)[:60]!r}, expected: {expected}", NOT_A_NUMBER)
    if not np.isfinite(numbers).all():
        return InvalidRow("NaN or infinity, finite numbers are expected", NOT_FINITE)
    if not 0 <= numbers[0] <= MAX_CLASS or numbers[0] != int(numbers[0]):
        return InvalidRow(f"class {values[0]}, a whole number from 0 is expected", WRONG_CLASS)
    if not limited:
        return numbers
    outside = np.flatnonzero((numbers[1:] < -ROUNDING) | (numbers[1:] > 1 + ROUNDING))
    if len(outside):
        column = int(outside[0]) + 1
        return InvalidRow(f"coordinate {values[column]} in column {column + 1}, values normalised to 0-1 are expected", OUT_OF_RANGE)
    numbers[1:] = numbers[1:].clip(0, 1)
    return numbers
