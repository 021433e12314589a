"""Polygons to masks at a fraction of the image's size, one mask an object or one index map for all."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray


def polygon_masks(
    polygons: Sequence[NDArray[np.float32] | Sequence[NDArray[np.float32]]], hw: tuple[int, int], *, ratio: int = 1
) -> NDArray[np.uint8]:
    """A mask for each polygon (k, 2) of px, or for several rings of one object: filled at full size with its border, then shrunk.

    A cell at ratio 4 is set where at least two of the four central pixels of its 4 x 4 block are; at ratio 2 at least two of its four.

    Args:
        hw: height and width of the image in px; polygons may leave it.
        ratio: px of the image for each cell of the mask.

    Returns:
        (n, h // ratio, w // ratio) of 0 and 1.
    """
    h, w = hw
    small = (h // ratio, w // ratio)
    masks = np.zeros((len(polygons), *small), np.uint8)
    full = np.zeros(hw, np.uint8)
    for mask, polygon in zip(masks, polygons):
        if len(polygon) == 0:
            continue
        rings = [polygon] if isinstance(polygon, np.ndarray) else polygon
        corners = [np.clip(ring, -(2**15), 2**15).astype(np.int32) for ring in rings]  # towards zero, as the published masks have it
        everything = np.concatenate(corners)
        (left, top), (right, bottom) = everything.min(0), everything.max(0)
        y0, x0 = (max(int(v), 0) // ratio * ratio for v in (top, left))
        y1, x1 = (min(-(-(int(v) + 1) // ratio) * ratio, side) for v, side in ((bottom, small[0] * ratio), (right, small[1] * ratio)))
        if y1 <= y0 or x1 <= x0:
            continue
        part = full[y0:y1, x0:x1]  # only the blocks that the polygon touches
        cv2.fillPoly(part, [ring - np.array((x0, y0), np.int32) for ring in corners], color=1)  # type: ignore[call-overload]
        mask[y0 // ratio : y1 // ratio, x0 // ratio : x1 // ratio] = _shrunk(part, ratio)
        part[:] = 0
    return masks


def _shrunk(mask: NDArray[np.uint8], ratio: int) -> NDArray[np.uint8]:
    """A mask at a fraction of its size: half of the pixels about the middle of each block decide."""
    if ratio == 1:
        return mask
    h, w = mask.shape[0] // ratio, mask.shape[1] // ratio
    blocks = mask.reshape(h, ratio, w, ratio)
    middle = slice((ratio - 1) // 2, ratio // 2 + 1)  # one row of an odd block, two of an even one
    pixels = blocks[:, middle, :, middle]
    return (2 * pixels.sum(axis=(1, 3)) >= pixels.shape[1] * pixels.shape[3]).astype(np.uint8)


def index_map(masks: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """All objects of an image in one map, smaller ones on top of larger ones.

    Args:
        masks: (n, h, w) of 0 and 1.

    Returns:
        (h, w) of 0 for background and i + 1 for the object ``order[i]``, and the order (n,): by falling area, equal ones as they come.
    """
    order = np.argsort(-masks.sum(axis=(1, 2), dtype=np.int64), kind="stable")
    indices = np.zeros(masks.shape[1:], np.int32)
    for place, i in enumerate(order, start=1):
        indices[masks[i] > 0] = place
    return indices, order
