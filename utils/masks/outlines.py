"""Outlines of masks: rings of pixel centres, several where a mask is in pieces or has holes, and one polygon out of many rings.

Rings are joined by bridges, walked there and back, that enclose no area: a label row has one polygon an object.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.masks.packed import Extents, Packed, unpack

Ring = NDArray[np.float32]  # (k, 2) x, y in px, from pixel corners
MOST_COMPARED = 500  # points of a ring


def rings_of(mask: NDArray[np.uint8], *, x: float = 0.0, y: float = 0.0) -> list[Ring]:
    """The rings (k, 2) of a mask (h, w) whose first pixel is at (x, y) of its image: outer ones and holes, the largest first.

    Filled by the even-odd rule with their border, they give the mask back. Where a piece is so thin that its ring has no area, the ring
    goes about its pixels.
    """
    if not mask.size:
        return []
    contours, hierarchy = cv2.findContours(np.ascontiguousarray(mask, np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not len(contours):
        return []
    is_hole = hierarchy[0, :, 3] >= 0  # type: ignore[index]
    rings = [_with_area(c.reshape(-1, 2).astype(np.float32) + 0.5) for c, hole in zip(contours, is_hole) if not hole or len(c) > 2]
    offset = np.array((x, y), np.float32)
    return sorted((ring + offset for ring in rings), key=lambda ring: -_area(ring))


def rings_of_packed(packed: Packed) -> list[list[Ring]]:
    """The rings of every mask (n, h, ceil(w / 8))."""
    extents = Extents.of(packed)
    found = []
    for index, mask in enumerate(packed):
        rows, columns = extents.window(index)
        found.append(rings_of(unpack(mask[rows, columns], 8 * (columns.stop - columns.start)), x=8 * columns.start, y=rows.start))
    return found


def joined(rings: Sequence[NDArray]) -> NDArray[np.float32]:
    """One polygon (k, 2) out of rings, each tied to the nearest point of those before it by a bridge.

    Example: rings ABC and DEF, nearest at B and E, give A B E F D E B C.
    """
    if not len(rings):
        return np.zeros((0, 2), np.float32)
    whole = np.asarray(rings[0], np.float32)
    for ring in (np.asarray(ring, np.float32) for ring in rings[1:]):
        some, others = -(-len(whole) // MOST_COMPARED), -(-len(ring) // MOST_COMPARED)  # of long rings not every point is tried
        gaps = np.square(whole[::some, None] - ring[None, ::others]).sum(2)
        here, there = (int(i) for i in np.unravel_index(int(gaps.argmin()), gaps.shape))
        here, there = here * some, there * others
        whole = np.concatenate((whole[: here + 1], ring[there:], ring[: there + 1], whole[here:]))
    return whole


def _with_area(ring: Ring) -> Ring:
    """The ring; where it is a dot or a straight line of pixels, a thin quadrangle through the same pixels, which every reader takes."""
    ends = np.unique(ring, axis=0)
    if len(ends) > 2 and (np.ptp(ends, axis=0) > 0).all():
        return ring
    first, last = ends[0], ends[-1]
    across = np.array((0.2, -0.2 if (last - first).prod() >= 0 else 0.2), np.float32)
    along = np.array((0.2, 0.2), np.float32) if len(ends) == 1 else np.zeros(2, np.float32)
    return np.stack((first - along - across, last + along - across, last + along + across, first - along + across))


def _area(ring: NDArray) -> float:
    following = np.roll(ring, -1, axis=0)
    return abs(float((ring[:, 0] * following[:, 1] - following[:, 0] * ring[:, 1]).sum())) / 2
