"""Image operations for any number of channels and both depths; OpenCV's own functions take four channels and 8-bit colours."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch.nn import functional as F

FILL = 114  # grey of the border, in 8 bits
TO_16_BITS = 257  # 255 becomes 65535
# what decoders of Pillow raise for damaged files, beside its DecompressionBombError
DAMAGED = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, LookupError, TypeError, ArithmeticError, MemoryError, struct.error)
OPENCV_CHANNELS = 4  # that all of its functions accept


def fill_of(dtype: np.dtype | type[np.generic]) -> int:
    """The grey of the border at a depth: the same part of the full range at each."""
    return FILL * TO_16_BITS if np.dtype(dtype) == np.uint16 else FILL


def in_channel_groups(function: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """Applies an OpenCV function that treats all channels alike to an image (H, W, C), four channels at a time."""
    channels = image.shape[2]
    if channels <= OPENCV_CHANNELS:
        return as_hwc(function(image))
    starts = range(0, channels, OPENCV_CHANNELS)
    return np.concatenate([as_hwc(function(np.ascontiguousarray(image[:, :, i : i + OPENCV_CHANNELS]))) for i in starts], axis=2)


def resized(image: np.ndarray, size_wh: tuple[int, int], *, interpolation: int = cv2.INTER_LINEAR) -> np.ndarray:
    """The image (h, w, C) at another size, width and height in px."""
    return in_channel_groups(lambda part: cv2.resize(part, size_wh, interpolation=interpolation), image)


def resized_smoothly(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """The image (h, w, C) at another height and width in px: bilinear, over all pixels that fall into one where it shrinks."""
    if image.shape[:2] == size_hw:
        return image
    planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    if image.dtype != np.uint8:
        planes = planes.to(torch.float32)
    out = F.interpolate(planes, size=size_hw, mode="bilinear", antialias=True, align_corners=False)[0].permute(1, 2, 0)
    if image.dtype != np.uint8:
        out = out.round().clamp(0, np.iinfo(image.dtype).max)
    return np.ascontiguousarray(out.numpy()).astype(image.dtype, copy=False)


def covering_size(hw: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The least height and width in px of an image of ``hw`` px that covers a shape; rounded down, as torchvision does."""
    ratio = max(shape[0] / hw[0], shape[1] / hw[1])
    return max(math.floor(hw[0] * ratio + 1e-6), shape[0]), max(math.floor(hw[1] * ratio + 1e-6), shape[1])


def blended(first: np.ndarray, second: np.ndarray, ratio: float) -> np.ndarray:
    """``ratio`` of one image (H, W, C) and the rest of another of its size."""
    h, w, channels = first.shape
    return cv2.addWeighted(first.reshape(h, -1), ratio, second.reshape(h, -1), 1 - ratio, 0).reshape(h, w, channels)


def brightened(image: np.ndarray, factor: float) -> np.ndarray:
    """Every value multiplied by one factor, cut at the full range."""
    flat = image.reshape(len(image), -1)
    if image.dtype == np.uint8:
        return cv2.LUT(flat, np.clip(np.arange(256) * factor, 0, 255).astype(np.uint8)).reshape(image.shape)
    return cv2.addWeighted(flat, factor, flat, 0, 0).reshape(image.shape)


def as_hwc(image: np.ndarray) -> np.ndarray:
    """Restores the channel axis that OpenCV drops from images with one channel."""
    return image if image.ndim == 3 else image[:, :, None]


def imdecode(data: np.ndarray, flag: int) -> np.ndarray | None:
    """OpenCV's image of the bytes (n,) uint8 of a file; None where it cannot decode it."""
    try:
        return cv2.imdecode(data, flag)
    except cv2.error:
        return None
