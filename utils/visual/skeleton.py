"""Keypoints and the lines between them, legible on any background."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.visual.draw import Colour, Image, default_thickness

SHOWN = 0.25  # confidence of a keypoint that is drawn
OUTLINE = (20, 20, 20)
RIM = (255, 255, 255)
SUBPIXEL_BITS = 4
FARTHEST_PX = 1 << 14
LINES_OF_SIZE = 0.022  # width of a line as a part of the extent of the object's keypoints
POINT_RADIUS = 1.15  # as a part of a line's width
SMALL_PX = 120  # extent of an object below which points and their rims are smaller, too
LARGEST_LINE = 2.0  # as a multiple of the usual width


def draw_skeletons(
    image: Image, keypoints: NDArray, limbs: Sequence[tuple[int, int]], *, line_thickness: int | None = None
) -> Image:  # fmt: skip
    """Draws the keypoints of objects and the lines between them onto an image (H, W, 3), in place; the last object lies on top.

    Small objects have thinner lines. Every limb and point has a colour by its number, so left and right can be told apart.

    Args:
        image: RGB.
        keypoints: (n, K, 3) x and y in px, confidence; below ``SHOWN`` a keypoint and its limbs are left out.
        limbs: pairs of keypoints.
        line_thickness: px of the lines; by the sizes of image and object if not given.
    """
    for points in keypoints:
        shown = np.isfinite(points).all(axis=1) & (points[:, 2] >= SHOWN)
        if shown.any():
            width = line_thickness or _thickness(image, points[shown])
            _draw_one(image, points[:, :2].clip(-FARTHEST_PX, FARTHEST_PX), shown, limbs, width=width)
    return image


def _draw_one(image: Image, xy: NDArray, shown: NDArray[np.bool_], limbs: Sequence[tuple[int, int]], *, width: int) -> None:
    corners = np.round(np.nan_to_num(xy) * (1 << SUBPIXEL_BITS)).astype(int).tolist()
    lines = [(a, b) for a, b in limbs if shown[a] and shown[b]]
    colours = _colours(len(xy))
    for a, b in lines:  # all outlines first, so that none crosses a limb
        cv2.line(image, corners[a], corners[b], OUTLINE, width + 2, cv2.LINE_AA, SUBPIXEL_BITS)
    for a, b in lines:
        cv2.line(image, corners[a], corners[b], colours[max(a, b)], width, cv2.LINE_AA, SUBPIXEL_BITS)
    part = min(_extent(xy[shown]) / SMALL_PX, 1.0) if shown.sum() > 1 else 1.0
    radius = max(POINT_RADIUS * width, 1.5) * max(part, 0.5)
    for k in np.flatnonzero(shown).tolist():
        for extent, colour in ((radius + 1.5 * part, OUTLINE), (radius + 0.75 * part, RIM), (radius - 0.25 * part, colours[k])):
            cv2.circle(image, corners[k], round(extent * (1 << SUBPIXEL_BITS)), colour, -1, cv2.LINE_AA, SUBPIXEL_BITS)


def _thickness(image: Image, points: NDArray) -> int:
    usual = default_thickness(image.shape[:2])
    return int(np.clip(round(_extent(points[:, :2]) * LINES_OF_SIZE), 1, round(LARGEST_LINE * usual)))


def _extent(xy: NDArray) -> float:
    """The longer side in px of the box around points (n, 2)."""
    return float(np.ptp(xy, axis=0).max())


@cache
def _colours(count: int) -> tuple[Colour, ...]:
    """One colour a keypoint, around the circle of hues, in two strengths by turns."""
    colours = []
    for k in range(count):
        r, g, b = colorsys.hsv_to_rgb((0.02 + 0.85 * k / max(count, 1)) % 1, *((0.85, 1.0), (0.65, 0.95))[k % 2])
        colours.append((round(r * 255), round(g * 255), round(b * 255)))
    return tuple(colours)
