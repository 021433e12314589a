"""Any image that OpenCV or Pillow can open, as an array of the requested channels and depth; and a check that decodes only if necessary.

Files are read with numpy and decoded from memory, so paths may contain any character. Any image is converted to grey or RGB; any other
number of channels is what the file must hold (data/images/bands.py), without conversion. EXIF orientation is always applied.
"""

from __future__ import annotations

import io
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from data.images import jpeg, orientation
from data.images.bands import ARRAY_SUFFIX, IMAGE_CACHE, BandsError, as_grey_or_rgb, read_array, read_bands
from data.images.pixels import DAMAGED, TO_16_BITS, as_hwc, imdecode
from data.images.tiff import TiffError, opencv_misreads, read_first_page, without_other_pages
from utils.errors import UserError
from utils.files import read_bounded
from utils.reading.limits import MAX_IMAGE_BYTES

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".dib", ".dng", ".gif", ".heic", ".heif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pfm", ".pgm", ".png")
    + (".pnm", ".ppm", ".tif", ".tiff", ".webp", ARRAY_SUFFIX)
)
CONVERTED = (1, 3)  # channels that any image is converted to
CONVERTIBLE = (1, 3, 4)  # channels that are converted to those
MIN_SIDE_PX = 10
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class ImageError(UserError):
    """An image that cannot be used; the message names the file and what is wrong with it."""


def read_image(path: str | Path, *, channels: int = 3, dtype: type[np.generic] | None = np.uint8, least_side: int = 0) -> np.ndarray:
    """Decodes an image of any mode.

    Args:
        path: the file.
        channels: 1 (grey), 3 (RGB) or more (the file must hold that many; the first three in RGB order).
        dtype: ``np.uint8`` or ``np.uint16``; other depths are converted. None: the file's own, 16 bits for everything but 8.
        least_side: px that the longer side must have; larger JPEG files of one or three channels may be decoded at a half, a quarter or
            an eighth of their size. 0: every file is decoded whole.

    Returns:
        (H, W, channels) contiguous array.

    Raises:
        ImageError: missing, empty, undecodable, or of another number of channels.
    """
    try:
        data = np.frombuffer(read_bounded(path, limit=MAX_IMAGE_BYTES), dtype=np.uint8)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
    return decode_image(data, path, channels=channels, dtype=dtype, least_side=least_side)


def decode_image(
    data: np.ndarray, path: str | Path, *, channels: int = 3, dtype: type[np.generic] | None = np.uint8, least_side: int = 0
) -> np.ndarray:
    """Decodes the bytes (n,) uint8 of an image, as ``read_image`` does; ``path`` is for its suffix and for messages only."""
    if not data.size:
        raise ImageError(f"{path}: the file is empty")
    try:
        image = _decode(path, data, channels, dtype, least_side)
    except (BandsError, TiffError) as error:
        raise ImageError(f"{path}: {error}") from error
    if image.shape[2] != channels:
        raise ImageError(f"{path}: {image.shape[2]} channels, {channels} are expected")
    if dtype is None:
        dtype = np.uint8 if image.dtype == np.uint8 else np.uint16
    return np.ascontiguousarray(_to_depth(image, dtype))


def probe_image(path: str | Path, *, channels: int = 3) -> tuple[int, int]:
    """Height and width of an image as displayed, without decoding it where its format allows a check of completeness.

    JPEG must end with its end marker (files with trailing bytes are decoded instead), PNG chunks must have correct checksums; all other
    formats are decoded, and so are all files that must hold a number of channels other than 1 and 3.

    Raises:
        ImageError: missing, empty, cut short, not an image, smaller than 10 px, or without the ``channels``.
    """
    from PIL import Image

    path = Path(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would block
            raise ImageError(f"{path}: not a file{', but a folder' if stat.S_ISDIR(found.st_mode) else ''}")
        if found.st_size == 0:
            raise ImageError(f"{path}: the file is empty")
        if path.suffix.lower() == ARRAY_SUFFIX:
            return _check_size(path, read_image(path, channels=channels, dtype=None).shape)
        with Image.open(path) as image:
            width, height = image.size
            if image.format in ("JPEG", "MPO"):
                if image.getexif().get(orientation.TAG) in _TRANSPOSED:
                    width, height = height, width
                if not _has_jpeg_end(path):
                    image.load()
            elif image.format == "PNG":
                rotated = image.info.get("exif") and image.getexif().get(orientation.TAG) in _TRANSPOSED
                image.verify()
                if rotated:  # not every OpenCV applies it to a PNG
                    height, width = read_image(path).shape[:2]
            else:
                image.load()
            checked = image.format in ("JPEG", "MPO", "PNG") and channels in CONVERTED
        if not checked:
            height, width = read_image(path, channels=channels, dtype=None).shape[:2]
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except (*DAMAGED, Image.DecompressionBombError) as error:
        height, width = _probe_without_pillow(path, channels, error)
    return _check_size(path, (height, width))


def pixels_of(image: PillowImage, *, channels: int, dtype: type[np.generic] | None = None) -> np.ndarray:
    """(H, W, channels), grey or RGB, of an opened image of any mode; modes of more than 8 bits, which are grey, keep their depth.

    Args:
        image: without its EXIF orientation, which is not applied here.
        channels: 1 or 3.
        dtype: of images of more than 8 bits: ``np.uint8`` or ``np.uint16``, which None means too.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # Pillow's own conversion cuts them off at 255
        grey = np.asarray(image)
        grey = grey.astype(grey.dtype.newbyteorder("="), copy=False)
        return np.repeat(_to_depth(grey, dtype or np.uint16)[:, :, None], channels, axis=2)
    return as_hwc(np.array(image.convert("RGB" if channels == 3 else "L")))


def is_image(path: str | Path) -> bool:
    """Whether the file name looks like an image's (``._name``, which macOS leaves on other disks, does not)."""
    path = Path(path)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("._") and not IMAGE_CACHE.search(path.name)


def holds_more_than_8_bits(path: str | Path, *, channels: int) -> bool:
    """Whether an image has 16 bits, or floats; decodes it only where its format and its first bytes do not decide.

    Raises:
        ImageError: it cannot be decoded.
    """
    suffix = Path(path).suffix.lower()
    if suffix in (".jpg", ".jpeg", ".bmp", ".webp"):
        return False
    if suffix == ".png":
        with open(path, "rb") as file:
            head = file.read(25)
        if head[:4] == b"\x89PNG" and len(head) == 25:
            return head[24] > 8  # bit depth in the header chunk, which comes first
    return read_image(path, channels=channels, dtype=None).dtype != np.uint8


def _check_size(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    height, width = shape[:2]
    if min(height, width) < MIN_SIDE_PX:
        raise ImageError(f"{path}: {width}x{height} px, at least {MIN_SIDE_PX} px a side are needed")
    return height, width


def _probe_without_pillow(path: Path, channels: int, error: Exception) -> tuple[int, int]:
    """Size of an image that Pillow refuses, by OpenCV; not of truncated files, which OpenCV fills with grey."""
    text = " ".join(str(error).split())
    if "truncated" in text.lower() or "broken" in text.lower():
        raise ImageError(f"{path}: the file is cut short or damaged ({text})") from error
    return _check_size(path, read_image(path, channels=channels, dtype=None).shape)


def _has_jpeg_end(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-2, 2)
        return file.read(2) == b"\xff\xd9"


def _decode(path: str | Path, data: np.ndarray, channels: int, dtype: type[np.generic] | None, least_side: int) -> np.ndarray:
    """(H, W, C) in RGB order and the file's depth; grey or RGB where one or three channels are requested."""
    if Path(path).suffix.lower() == ARRAY_SUFFIX:
        return as_grey_or_rgb(read_array(data, channels), channels)
    if channels not in CONVERTED:
        return read_bands(data, channels)
    if opencv_misreads(data):
        return as_grey_or_rgb(read_first_page(data, samples=CONVERTIBLE, channels=channels), channels)
    data = without_other_pages(data)
    image = _decode_opencv(data, channels, dtype, least_side)
    return as_hwc(_decode_pillow(path, data, channels, dtype) if image is None else image)


def _decode_opencv(data: np.ndarray, channels: int, dtype: type[np.generic] | None, least_side: int) -> np.ndarray | None:
    """(H, W) or RGB (H, W, 3), or None where OpenCV cannot."""
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    eight_bits = dtype == np.uint8 or data[:2].tobytes() == jpeg.START
    if not eight_bits:
        flag |= cv2.IMREAD_ANYDEPTH
    rgb_flag: int | None = getattr(cv2, "IMREAD_COLOR_RGB", None)  # newer OpenCV decodes to RGB at no cost
    direct = channels == 3 and eight_bits and rgb_flag is not None  # it decodes 16-bit TIFFs to BGR
    if direct and rgb_flag is not None:
        flag = rgb_flag
    image = imdecode(data, flag | jpeg.reduced_flag(data, least_side))
    if image is None or image.dtype not in (np.uint8, np.uint16):
        return None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if image.ndim == 3 and not direct else image


def _decode_pillow(path: str | Path, data: np.ndarray, channels: int, dtype: type[np.generic] | None) -> np.ndarray:
    """Decodes with Pillow the formats and modes that OpenCV does not read."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            image = ImageOps.exif_transpose(image)
            return pixels_of(image, channels=channels, dtype=dtype)
    except UnidentifiedImageError as error:  # its text only repeats the path
        raise ImageError(f"{path}: not an image that can be read") from error
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: not an image that can be read ({' '.join(str(error).split())})") from error


def _to_depth(image: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """Scales integers by their full range, floats and wider integers by 0-1, 0-255 or 0-65535, whichever includes their maximum."""
    if image.dtype == dtype:
        return image
    top = float(np.iinfo(np.dtype(dtype)).max)
    if image.dtype == np.uint8:
        return image.astype(np.uint16) * np.uint16(TO_16_BITS)
    if image.dtype == np.uint16:
        return (image >> 8).astype(np.uint8)
    values = np.nan_to_num(image.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    peak = float(values.max(initial=0.0))
    full = 1.0 if peak <= 1.0 and image.dtype.kind == "f" else 255.0 if peak <= 255.0 else max(65535.0, peak)
    return (np.clip(values / full, 0.0, 1.0) * top).round().astype(dtype)
