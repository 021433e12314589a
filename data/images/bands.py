"""Images of any number of channels, read without conversion: RGBA and RGBN files, TIFFs of many bands or pages, .npy arrays."""

from __future__ import annotations

import io
import math
import re
import tokenize
from collections.abc import Iterable

import cv2
import numpy as np

from data.images.orientation import orientation_of, upright
from data.images.pixels import DAMAGED, as_hwc, imdecode
from data.images.tiff import is_tiff, pages_differ, read_pages

HEADER_ERRORS = (ValueError, EOFError, SyntaxError, tokenize.TokenError, TypeError, KeyError, RecursionError, MemoryError)  # of literals
ARRAY_SUFFIX = ".npy"
IMAGE_CACHE = re.compile(r"\.\d+c?[alr]\d+w?\.npy$")  # files that data/images/store.py writes beside images


class BandsError(ValueError):
    """An image whose channels cannot be read; the message says why."""


def read_bands(data: np.ndarray, channels: int) -> np.ndarray:
    """Decodes a file that should hold ``channels`` channels, without conversion, and applies its EXIF orientation.

    Of a TIFF, the first page is read if it has all channels; else all pages, one after another.

    Args:
        data: (n,) uint8, the whole file.
        channels: expected number; two, or four and more.

    Returns:
        (H, W, C) in the file's own depth, RGB order first; C is what the file has, which may be another number.

    Raises:
        BandsError: not an image, or damaged.
        TiffError: the same of a TIFF.
    """
    if is_tiff(data):
        return _stacked(read_pages(data, channels=channels), channels)
    image = imdecode(data, cv2.IMREAD_UNCHANGED)
    if image is not None:
        code = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}.get(as_hwc(image).shape[2])
        image = as_hwc(image if code is None else cv2.cvtColor(image, code))
    if image is None or image.shape[2] != channels:
        other = _pillow_bands(data)  # does not convert grey with alpha, and CMYK
        image = other if other is not None and (image is None or other.shape[2] == channels) else image
    if image is None:
        raise BandsError("not an image that can be read")
    return upright(image, orientation_of(data))


def read_array(data: np.ndarray, channels: int) -> np.ndarray:
    """An array of numpy's file format as an image (H, W, C): (H, W), (H, W, C) and (C, H, W) are accepted.

    Raises:
        BandsError: damaged, or of another shape or kind.
    """
    try:
        array = _load_array(data)
    except HEADER_ERRORS as error:
        raise BandsError(f"not an array of numbers that can be read ({' '.join(str(error).split())[:100]})") from error
    if array.ndim == 2:
        return array[:, :, None]
    if array.shape[2] != channels and (array.shape[0] == channels or array.shape[0] < min(array.shape[1:])):
        return array.transpose(1, 2, 0)
    return array


def _load_array(data: np.ndarray) -> np.ndarray:
    """The array of a file; ``np.load`` would take the memory that the header claims before it looks how large the file is."""
    file = io.BytesIO(data.tobytes())
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"format {version[0]}.{version[1]}, 1.0 or 2.0 is expected")
    shape, in_columns, dtype = readers[version](file)
    if dtype.kind not in "uif" or len(shape) not in (2, 3) or min(shape) < 1:
        raise BandsError("an array (H, W), (H, W, channels) or (channels, H, W) of numbers is expected")
    if math.prod(shape) * dtype.itemsize > data.size - file.tell():
        raise ValueError(f"the file is cut short: shape {shape} needs more")
    values = np.frombuffer(file.getbuffer(), dtype, count=math.prod(shape), offset=file.tell())
    return values.reshape(shape, order="F" if in_columns else "C")


def as_grey_or_rgb(image: np.ndarray, channels: int) -> np.ndarray:
    """Converts an image (H, W, C) of 1, 3 or 4 channels to grey (1) or RGB (3); returns others unchanged."""
    own = image.shape[2]
    if channels == 3 and own == 1:
        return np.repeat(image, 3, axis=2)
    if channels == 3 and own == 4:
        return image[:, :, :3]
    if channels == 1 and own in (3, 4):
        rgb = np.ascontiguousarray(image[:, :, :3])
        return as_hwc(cv2.cvtColor(rgb if rgb.dtype in (np.uint8, np.uint16) else rgb.astype(np.float32), cv2.COLOR_RGB2GRAY))
    return image


def without_stored_arrays(files: Iterable[str]) -> list[str]:
    """The images of a folder: .npy files count only where there are no others, since many programs store arrays beside images."""
    files = list(files)
    return [f for f in files if not f.lower().endswith(ARRAY_SUFFIX)] or files


def _stacked(pages: list[np.ndarray], channels: int) -> np.ndarray:
    if pages[0].shape[2] == channels:
        return pages[0]
    if len({page.shape[:2] for page in pages}) > 1:
        raise pages_differ(len(pages), pages[0].shape[2], channels)
    return np.concatenate(pages, axis=2)


def _pillow_bands(data: np.ndarray) -> np.ndarray | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data.tobytes())) as opened:
            image = np.array(opened)
    except (*DAMAGED, Image.DecompressionBombError):
        return None
    return as_hwc(image)
