"""The bit depth that the images of a data set are read in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.images.reading import ImageError, holds_more_than_8_bits

SAMPLED = 16  # images


def depth_of(files: Sequence[str], *, channels: int, bits: int | None = None) -> type[np.generic]:
    """``np.uint16`` if most images hold more than 8 bits, else ``np.uint8``; the others are converted.

    Args:
        files: some of them, evenly spread, are read.
        channels: that the images are read with.
        bits: 8 or 16, if the dataset file says so.
    """
    if bits is not None:
        return np.uint16 if bits == 16 else np.uint8
    step = max(1, len(files) // SAMPLED)
    deep = [_is_deep(file, channels) for file in files[::step][:SAMPLED]]
    return np.uint16 if 2 * sum(deep) > len(deep) else np.uint8


def _is_deep(file: str, channels: int) -> bool:
    try:
        return holds_more_than_8_bits(file, channels=channels)
    except (ImageError, OSError):
        return False  # reported when the loader reads it
