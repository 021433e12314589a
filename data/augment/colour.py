"""Colour: hue, saturation and value multiplied by random factors."""

from __future__ import annotations

import cv2
import numpy as np

from data.augment.hyp import AugmentHyp
from data.images.pixels import brightened


def hsv(image: np.ndarray, hyp: AugmentHyp, rng: np.random.Generator) -> np.ndarray:
    """Multiplies hue, saturation and value each by a factor drawn from 1 ± its gain.

    Hue and saturation need 8-bit RGB. Other images (one channel, more than three, 16 bits) are multiplied by the factor of value, which
    is what it does to a grey RGB image.
    """
    gains = np.array((hyp.hsv_h, hyp.hsv_s, hyp.hsv_v))
    factors = rng.uniform(-1, 1, 3) * gains + 1
    if not gains.any():
        return image
    if image.shape[2] != 3 or image.dtype != np.uint8:
        return brightened(image, float(factors[2])) if hyp.hsv_v else image
    levels = np.arange(256) * factors[:, None]
    levels[0] %= 180
    tables = np.clip(levels, 0, 255).astype(np.uint8)
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    changed = [cv2.LUT(plane, table) for plane, table in zip(planes, tables)]
    return cv2.cvtColor(cv2.merge(changed), cv2.COLOR_HSV2RGB)


def colour_note(channels: int, dtype: type[np.generic], hyp: AugmentHyp) -> str:
    """A line that says what the colour hyper-parameters do to images that are not 8-bit RGB; empty for those that are."""
    if channels == 3 and dtype == np.uint8:
        return ""
    kind = f"images of {channels} channel{'s' * (channels > 1)}, {8 * np.dtype(dtype).itemsize} bits"
    return f"{kind}: hsv_v {hyp.hsv_v:g} changes their brightness; hsv_h and hsv_s are for 8-bit RGB and do nothing"
