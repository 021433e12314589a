"""How many bits the images of a data set are read in, and what that and their channels mean for augmentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.augment.hyp import AugmentHyp
from data.images.reading import ImageError, holds_more_than_8_bits

LOOKED_AT = 16  # images


def depth_of(files: Sequence[str], *, channels: int, bits: int | None = None) -> type[np.generic]:
    """``np.uint16`` if most images hold more than 8 bits, else ``np.uint8``; the others are converted.

    Args:
        files: Some of them, evenly spread, are looked at.
        channels: That the images are read with.
        bits: 8 or 16, if the dataset file says so.
    """
    if bits is not None:
        return np.uint16 if bits == 16 else np.uint8
    step = max(1, len(files) // LOOKED_AT)
    deep = [_is_deep(file, channels) for file in files[::step][:LOOKED_AT]]
    return np.uint16 if 2 * sum(deep) > len(deep) else np.uint8


def colour_note(channels: int, dtype: type[np.generic], hyp: AugmentHyp) -> str:
    """One line about what the colour keys of the recipe do to images that are not 8-bit RGB; empty for those that are."""
    if channels == 3 and dtype == np.uint8:
        return ""
    kind = f"images of {channels} channel{'s' * (channels > 1)}, {8 * np.dtype(dtype).itemsize} bits"
    return f"{kind}: hsv_v {hyp.hsv_v:g} changes their brightness; hsv_h and hsv_s are for 8-bit RGB and do nothing"


def _is_deep(file: str, channels: int) -> bool:
    try:
        return holds_more_than_8_bits(file, channels=channels)
    except (ImageError, OSError):
        return False  # said when it is drawn
