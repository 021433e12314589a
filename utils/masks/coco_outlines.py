"""The ``segmentation`` of a COCO annotation as rings: polygons of one or several pieces, or run-length codes with their holes.

Everything is checked before it is used: a code's run lengths must add up to its size, and its size must be the image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.masks.outlines import rings_of
from utils.masks.rle import MOST_DIGITS, Code, digits_to_values, encode, encode_polygons

FEWEST_POINTS = 3
NOT_POLYGONS = "segmentation: polygons or a run-length code are expected"


def rings_of_annotation(segmentation: Any, hw: tuple[int, int]) -> tuple[list[NDArray], str]:
    """The rings (k, 2) of one object in px, to be filled by the even-odd rule, and what is wrong with it (empty where nothing is).

    Args:
        segmentation: a list of polygons x1 y1 x2 y2 …, or ``{"size": [h, w], "counts": …}``, as json gives it.
        hw: height and width of the image.
    """
    if not segmentation:
        return [], ""
    if isinstance(segmentation, dict):
        mask, fault = mask_of_code(segmentation, hw)
        return ([], fault) if mask is None else (rings_of(mask), "")
    if not isinstance(segmentation, list):
        return [], NOT_POLYGONS
    pieces = [_piece(part) for part in segmentation]
    if fault := next((p for p in pieces if isinstance(p, str)), ""):
        return [], fault
    rings = [p for p in pieces if not isinstance(p, str)]
    return (_union(rings, hw) if may_overlap(rings) else rings), ""


def code_of_annotation(segmentation: Any, box_ltwh: Sequence[float], hw: tuple[int, int]) -> tuple[Code, str]:
    """The mask of one object as a run-length code, as pycocotools makes it; that of its box, and why, where it cannot be used."""
    fault = ""
    if isinstance(segmentation, dict):
        mask, fault = mask_of_code(segmentation, hw)
        if mask is not None:
            return encode(mask[None])[0], ""
    elif segmentation:
        pieces = [_piece(part) for part in segmentation] if isinstance(segmentation, list) else [NOT_POLYGONS]
        fault = next((p for p in pieces if isinstance(p, str)), "")
        if not fault:
            return encode_polygons([np.clip(p, -(2**20), 2**20).ravel() for p in pieces], hw), ""  # type: ignore[arg-type]
    x, y, w, h = box_ltwh
    return encode_polygons([(x, y, x + w, y, x + w, y + h, x, y + h)], hw), fault


def mask_of_code(code: dict[str, Any], hw: tuple[int, int]) -> tuple[NDArray[np.uint8] | None, str]:
    """The mask (h, w) of a run-length code, compressed or not; None, and why, where it is no sound code of this size."""
    size, counts = code.get("size"), code.get("counts")
    if not isinstance(size, list) or [v for v in size if type(v) is int] != list(hw):
        return None, f"segmentation: size {str(size)[:40]}, expected [{hw[0]}, {hw[1]}], the image's"
    runs = _decompressed(counts) if isinstance(counts, str) else _whole_numbers(counts)
    if runs is None or len(runs) > hw[0] * hw[1] + 1 or (runs < 0).any() or int(runs.sum()) != hw[0] * hw[1]:
        return None, f"segmentation: counts are expected to add up to {hw[0]} x {hw[1]} px"
    values = (np.arange(len(runs)) & 1).astype(np.uint8)
    return np.repeat(values, runs).reshape(hw[1], hw[0]).T, ""


def _whole_numbers(counts: Any) -> NDArray[np.int64] | None:
    if not isinstance(counts, list) or not all(type(v) is int and 0 <= v < 2**40 for v in counts):
        return None
    return np.array(counts, np.int64)


def _decompressed(text: str) -> NDArray[np.int64] | None:
    """Run lengths of COCO's text: digits of five bits, the lowest first, with a sixth for "more follow"; from the fourth length on they
    are differences to the one before the last."""
    if not text.isascii():
        return None
    digits = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if not len(digits) or (digits < 0).any() or (digits > 63).any():
        return None
    ends = np.flatnonzero(digits & 0x20 == 0)
    if not len(ends) or ends[-1] != len(digits) - 1 or np.diff(ends, prepend=-1).max() > MOST_DIGITS:
        return None
    values, _ = digits_to_values(digits)
    for start in (1, 2):  # differences run along odd and even places, from the second and the third on
        values[start::2] = np.cumsum(values[start::2])
    return values


def _piece(part: Any) -> NDArray | str:
    """Points (k, 2) of one polygon, or what is wrong with it."""
    if not isinstance(part, list) or len(part) % 2 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in part):
        return "segmentation: polygons of x1 y1 x2 y2 … are expected"
    if len(part) < 2 * FEWEST_POINTS:
        return f"segmentation: a polygon of {len(part) // 2} points, {FEWEST_POINTS} or more are expected"
    try:
        points = np.array(part, np.float64).reshape(-1, 2)
    except OverflowError:
        return "segmentation: finite numbers are expected"
    return points if np.isfinite(points).all() else "segmentation: finite numbers are expected"


def may_overlap(rings: list[NDArray]) -> bool:
    """Whether the boxes of two pieces (k, 2) meet."""
    if len(rings) < 2:
        return False
    low, high = np.stack([r.min(0) for r in rings]), np.stack([r.max(0) for r in rings])
    meet = ((low[:, None] < high[None]) & (low[None] < high[:, None])).all(2)
    return bool(np.triu(meet, 1).any())


def _union(rings: list[NDArray], hw: tuple[int, int]) -> list[NDArray]:
    """Pieces that may overlap as rings that do not: COCO takes a pixel that any piece covers."""
    mask = np.zeros(hw, np.uint8)
    for ring in rings:
        cv2.fillPoly(mask, [np.clip(ring, -(2**15), 2**15).astype(np.int32)], color=1)  # type: ignore[call-overload]
    return list(rings_of(mask)) or rings
