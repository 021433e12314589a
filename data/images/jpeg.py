"""JPEG files that are decoded at a half, a quarter or an eighth of their size: at the scale of their blocks, in less time.

Such an image is the mean over the pixels that it leaves out, nearly, and free of the patterns that bilinear shrinking gives.
"""

from __future__ import annotations

import cv2
import numpy as np

START = b"\xff\xd8"
FLAGS = {8: cv2.IMREAD_REDUCED_GRAYSCALE_8, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2}  # without a colour
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that are followed by the size
_MAX_SEGMENTS = 1000


def reduced_flag(data: np.ndarray, least_side: int) -> int:
    """OpenCV's flag for the smallest scale of a file (n,) uint8 at which the longer side has ``least_side`` px; 0: none, or no JPEG."""
    size = jpeg_size(data)
    if not least_side or size is None:
        return 0
    return next((flag for factor, flag in FLAGS.items() if -(-max(size) // factor) >= least_side), 0)


def jpeg_size(data: np.ndarray) -> tuple[int, int] | None:
    """Height and width in px as stored, before any rotation, from the header of a JPEG file (n,) uint8; None if it holds none."""
    if data[:2].tobytes() != START:
        return None
    place = 2
    for _ in range(_MAX_SEGMENTS):
        head = data[place : place + 9].tobytes()
        if len(head) < 9 or head[0] != 0xFF:
            return None
        if head[1] == 0xFF:  # filling
            place += 1
        elif head[1] in _FRAMES:
            return int.from_bytes(head[5:7], "big"), int.from_bytes(head[7:9], "big")
        else:
            place += 2 + int.from_bytes(head[2:4], "big")
    return None
