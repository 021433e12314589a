"""EXIF orientation: the corner of an image where its first pixel belongs, from 1 (top left, as stored) to 8."""

from __future__ import annotations

import io

import numpy as np

TAG = 0x0112  # in EXIF, and in a TIFF's directory
SIGNATURES = (b"Exif", b"EXIF", b"eXIf", b"Raw profile type")  # of JPEG, WebP and PNG; a file without them has no EXIF to parse


def orientation_of(data: np.ndarray) -> int:
    """The orientation in a file's EXIF, 1 where there is none.

    Args:
        data: (n,) uint8, the whole file.
    """
    from PIL import Image

    raw = data.tobytes()
    if not any(signature in raw for signature in SIGNATURES):
        return 1
    try:
        with Image.open(io.BytesIO(raw)) as image:
            return int(image.getexif().get(TAG, 1))
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
        return 1


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """An image (H, W, C) turned upright; unchanged where the orientation is none of the eight."""
    if orientation not in range(2, 9):
        return image
    if orientation > 4:
        image = image.swapaxes(0, 1)
    flipped_axes = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}
    return np.flip(image, flipped_axes.get(orientation, ()))
