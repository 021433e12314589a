"""Centre crop: an image resized so that it covers a shape, and its middle cut out, as classifiers take it; the same type as a letterbox."""

from __future__ import annotations

import numpy as np

from data.augment.letterbox import LetterboxedImage, letterbox
from data.images.pixels import covering_size, resized_smoothly


def centre_crop(image: np.ndarray, new_shape: tuple[int, int]) -> LetterboxedImage:
    """The middle of an image at the least size that covers a shape; ``pad_xy`` is then negative: px that were cut off.

    Args:
        image: (h, w, C).
        new_shape: height and width in px; of a square one the image's shorter side becomes the side.
    """
    h, w = image.shape[:2]
    new_h, new_w = new_shape
    size_hw = covering_size((h, w), new_shape)
    image = resized_smoothly(image, size_hw)
    top, left = round((size_hw[0] - new_h) / 2), round((size_hw[1] - new_w) / 2)
    middle = np.ascontiguousarray(image[top : top + new_h, left : left + new_w])
    return LetterboxedImage(middle, (size_hw[1] / w, size_hw[0] / h), (-left, -top))


def fitted(image: np.ndarray, hw: tuple[int, int], *, whole_image: bool, auto: bool, stride: int) -> LetterboxedImage:
    """An image (h, w, C) as a network's input: letterboxed, or cropped for tasks whose result is one of the whole image.

    Args:
        image: of any size.
        hw: height and width in px of the input; of the letterbox at most, with ``auto``.
        whole_image: crop, as ``Task.whole_image`` says.
        auto: pad only to the next multiple of ``stride``.
        stride: of the network in px.
    """
    return centre_crop(image, hw) if whole_image else letterbox(image, hw, auto=auto, stride=stride)
