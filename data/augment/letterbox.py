"""Letterbox: an image fitted into a shape at its own aspect ratio, the rest filled with grey."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.images.pixels import fill_of, resized


class LetterboxedImage(NamedTuple):
    """A letterboxed image: ``xy_out = xy_in * scale_xy + pad_xy``."""

    image: np.ndarray  # (H, W, C)
    scale_xy: tuple[float, float]
    pad_xy: tuple[int, int]  # px at the left and at the top


def letterbox(
    image: np.ndarray,
    new_shape: int | tuple[int, int],
    *,
    color: tuple[int, int, int] | None = None,
    auto: bool = True,
    scale_fill: bool = False,
    scaleup: bool = True,
    stride: int = 32,
) -> LetterboxedImage:
    """Fits an image into a shape at its own aspect ratio and fills the rest.

    Args:
        image: (h, w, C).
        new_shape: height and width in px, or one number for both.
        color: of the border of an RGB image, in its own depth; else, and for all other images, grey 114 of 255.
        auto: pad only to the next multiple of ``stride`` in each direction.
        scale_fill: stretch instead of padding (ignored with ``auto``).
        scaleup: whether small images are enlarged.
        stride: in px.
    """
    h, w = image.shape[:2]
    new_h, new_w = (new_shape, new_shape) if isinstance(new_shape, int) else new_shape
    ratio = min(new_h / h, new_w / w)
    ratio = ratio if scaleup else min(ratio, 1.0)
    inner_w, inner_h = max(round(w * ratio), 1), max(round(h * ratio), 1)
    dw, dh = new_w - inner_w, new_h - inner_h
    if auto:
        dw, dh = dw % stride, dh % stride
    elif scale_fill:
        inner_w, inner_h, dw, dh = new_w, new_h, 0, 0
    if (w, h) != (inner_w, inner_h):
        image = resized(image, (inner_w, inner_h))
    left, top = dw // 2, dh // 2
    if dw or dh:
        padded = np.empty((inner_h + dh, inner_w + dw, image.shape[2]), image.dtype)
        padded[:] = color if color is not None and image.shape[2] == 3 else fill_of(image.dtype)
        padded[top : top + inner_h, left : left + inner_w] = image
        image = padded
    return LetterboxedImage(image, (inner_w / w, inner_h / h), (left, top))
