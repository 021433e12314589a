"""Colour: hue, saturation and value multiplied by random factors."""

from __future__ import annotations

import cv2
import numpy as np

from data.augment.hyp import AugmentHyp
from data.images.pixels import brightened

LEVELS = np.arange(256, dtype=np.uint8)
STRIP = 64  # rows
HUES = 180  # of 8 bits, two degrees each


def hsv(image: np.ndarray, hyp: AugmentHyp, rng: np.random.Generator) -> np.ndarray:
    """Multiplies hue, saturation and value each by a factor drawn from 1 ± its gain.

    Hue and saturation need 8-bit RGB. Other images (one channel, more than three, 16 bits) are multiplied by the factor of value, which
    is what it does to a grey RGB image.
    """
    return coloured(image, draw_factors(hyp, rng))


def draw_factors(hyp: AugmentHyp, rng: np.random.Generator) -> np.ndarray | None:
    """Factors (3,) of hue, saturation and value; None if all gains are zero."""
    gains = np.array((hyp.hsv_h, hyp.hsv_s, hyp.hsv_v))
    factors = rng.uniform(-1, 1, 3) * gains + 1
    return factors if gains.any() else None


def level_tables(factors: np.ndarray) -> np.ndarray:
    """For each level (3, 256) uint8 of hue, saturation and value the one that it becomes."""
    levels = np.arange(256) * factors[:, None]
    levels[0] %= HUES
    return np.clip(levels, 0, 255).astype(np.uint8)


def coloured(image: np.ndarray, factors: np.ndarray | None, *, out: np.ndarray | None = None) -> np.ndarray:
    """The image (H, W, C) with hue, saturation and value multiplied by factors (3,); in ``out``, which may be the image, if it is RGB."""
    if factors is None:
        return image
    if image.shape[2] != 3 or image.dtype != np.uint8:
        return image if factors[2] == 1 else brightened(image, float(factors[2]))
    out = np.empty_like(image) if out is None else out
    tables = level_tables(factors)
    is_product = [bool((multiplied(LEVELS, factor).ravel() == table).all()) for factor, table in zip(factors, tables)]
    for top in range(0, len(image), STRIP):  # what lies between the steps stays in the processor's cache
        strip, result = image[top : top + STRIP], out[top : top + STRIP]
        changed = cv2.cvtColor(strip, cv2.COLOR_RGB2HSV)
        planes = cv2.split(changed)
        for plane, table, factor, is_exact in zip(planes, tables, factors, is_product):
            if is_exact:
                multiplied(plane, factor, out=plane)
            else:
                cv2.LUT(plane, table, dst=plane)
        cv2.merge(planes, dst=changed)
        cv2.cvtColor(changed, cv2.COLOR_HSV2RGB, dst=result)
    return out


def multiplied(levels: np.ndarray, factor: float, *, out: np.ndarray | None = None) -> np.ndarray:
    """Levels times a factor, cut to whole ones as in a table, in a third of the time; but for products just below a whole number."""
    return cv2.convertScaleAbs(levels, dst=out, alpha=factor, beta=-0.4999)  # OpenCV rounds to the nearest


def colour_note(channels: int, dtype: type[np.generic], hyp: AugmentHyp) -> str:
    """A line that says what the colour hyper-parameters do to images that are not 8-bit RGB; empty for those that are."""
    if channels == 3 and dtype == np.uint8:
        return ""
    kind = f"images of {channels} channel{'s' * (channels > 1)}, {8 * np.dtype(dtype).itemsize} bits"
    return f"{kind}: hsv_v {hyp.hsv_v:g} changes their brightness; hsv_h and hsv_s are for 8-bit RGB and do nothing"
