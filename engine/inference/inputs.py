"""What a caller may hand to a model: paths, folders, globs, lists, URLs, arrays, PIL images and tensors, each as single images."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.images.reading import pixels_of, read_image
from data.sources.files import find_files, is_video
from data.sources.urls import is_url, read_remote_image, redacted
from utils.errors import UserError

log = logging.getLogger(__name__)
ImageSource: TypeAlias = "str | Path | np.ndarray | Tensor | Any"  # Any: a PIL image
VIDEOS = "videos, streams and webcams are read by detect.py --source"


def single_images(source: ImageSource | Sequence[ImageSource], channels: int) -> Iterator[ImageSource]:
    """Every image of a source: a folder, glob or list of files as its paths, a batch of tensors as its images, anything else as it is.

    Raises:
        UserError: nothing is there, or a tensor of another shape, or a video.
    """
    for item in source if isinstance(source, (list, tuple)) else [source]:
        if isinstance(item, Tensor):
            yield from _images_of_tensor(item, channels)
        elif isinstance(item, (str, Path)) and not is_url(str(item)):
            yield from _files_of(str(item))
        else:
            yield item


def as_array(image: ImageSource, channels: int) -> np.ndarray:
    """(H, W, channels) uint8 or uint16 of a path, a URL, an array or a PIL image. Raises UserError for anything else."""
    if isinstance(image, (str, Path)):
        if is_url(str(image)):
            return read_remote_image(str(image), channels=channels)
        return read_image(image, channels=channels, dtype=None)
    if isinstance(image, Image.Image):
        if channels not in (1, 3):
            raise UserError(f"a PIL image has no {channels} channels; give an array (H, W, {channels})")
        image = pixels_of(ImageOps.exif_transpose(image), channels=channels)
    if not isinstance(image, np.ndarray):
        kind = type(image).__name__
        raise UserError(f"an image should be a path, an array, a PIL image or a tensor, not {kind}{'; ' + VIDEOS if kind == 'int' else ''}")
    if image.dtype not in (np.uint8, np.uint16):
        raise UserError(f"an array should be uint8 or uint16, not {image.dtype}")
    array = image[:, :, None] if image.ndim == 2 else image
    if array.ndim == 3 and channels == 3 and array.shape[2] in (1, 4):  # grey, or with transparency
        array = array[:, :, :3] if array.shape[2] == 4 else np.repeat(array, 3, axis=2)
    if array.ndim != 3 or array.shape[2] != channels or not array.size:
        raise UserError(f"an array should be (H, W, {channels}){' in RGB order' if channels == 3 else ''}, not {image.shape}")
    return np.ascontiguousarray(array)


def file_name(image: ImageSource, index: int) -> str:
    """The path of an image, without a URL's password; ``image0.jpg`` … for images that come from memory."""
    given = image if isinstance(image, (str, Path)) else getattr(image, "filename", "")
    if not isinstance(given, (str, Path)) or not str(given):
        return f"image{index}.jpg"
    return redacted(str(given)) if is_url(str(given)) else str(given)


def _images_of_tensor(image: Tensor, channels: int) -> list[Tensor]:
    if image.dim() == 3:
        image = image[None]
    if image.dim() != 4 or image.shape[1] != channels or min(image.shape[2:], default=0) < 1:
        raise UserError(
            f"a tensor should be ({channels}, H, W), or a batch of these, not {tuple(image.shape)}; arrays are (H, W, {channels})"
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise UserError(f"a tensor should hold floats in 0-1 or uint8, not {image.dtype}")
    return list(image)


def _files_of(text: str) -> list[str]:
    """The images that a path, folder, glob or .txt list names; videos in a folder are left out with a line."""
    path = Path(text).expanduser()
    several = path.is_dir() or path.suffix.lower() == ".txt" or (glob.has_magic(text) and not path.is_file())
    if not several:
        if is_video(path):
            raise UserError(f"{text}: a video; {VIDEOS}")
        return [str(path)]
    try:
        found = find_files(text)
    except UserError as error:
        raise UserError(str(error).removeprefix("--source ")) from None
    images = [file for file in found if not is_video(file)]
    if not images:
        raise UserError(f"{text}: no image, only videos; {VIDEOS}")
    if len(images) < len(found):
        log.warning("%s: %d videos are left out; %s", text, len(found) - len(images), VIDEOS)
    return images
