"""Masks on images: tinted areas with an outline."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.masks.packed import Extents, Packed, unpack
from utils.visual.draw import Image, colour_of, default_thickness

OPACITY = 0.45  # of the tint
DARKER = 0.6  # the outline's colour, so that it shows on its own tint and on objects of this colour


def draw_masks(image_rgb: Image, packed: Packed, classes: Sequence[int], *, thickness: int | None = None) -> NDArray[np.uint8]:
    """A copy of an RGB image (H, W, 3) with masks on it, the first one on top.

    Args:
        image_rgb: not changed.
        packed: (n, H, ceil(W / 8)), best score first.
        classes: of each, for its colour.
        thickness: of the outlines in px; by the image's size if not given.
    """
    shown = image_rgb.copy()
    height, width = shown.shape[:2]
    extents, line = Extents.of(packed), thickness or default_thickness((height, width))
    for index in range(len(packed) - 1, -1, -1):
        rows, byte = extents.window(index)
        part = shown[rows, 8 * byte.start : 8 * byte.stop]
        mask = unpack(packed[index, rows, byte], 8 * (byte.stop - byte.start))[: part.shape[0], : part.shape[1]]
        if not mask.any():
            continue
        colour = np.array(colour_of(classes[index]), np.float32)
        inside = mask > 0
        part[inside] = (part[inside] * (1 - OPACITY) + colour * OPACITY).round().astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        outline = tuple(int(v) for v in colour * DARKER)
        offset = (8 * byte.start, rows.start)
        cv2.drawContours(shown, contours, -1, outline, max(line // 2, 1), cv2.LINE_AA, offset=offset)  # type: ignore[call-overload]
    return shown
