"""Any picture that OpenCV or Pillow can open as an array of the wanted channels and depth, and a cheap check of one that decodes nothing.

Files are read with numpy and decoded from memory, so paths may hold any character. EXIF orientation is applied everywhere.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".dib", ".dng", ".gif", ".heic", ".heif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pfm", ".pgm", ".png")
    + (".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
MIN_SIDE_PX = 10
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_EXIF_ORIENTATION = 0x0112


class ImageError(UserError):
    """A picture that cannot be used; the message names the file and what is wrong with it."""


def read_image(path: str | Path, *, channels: int = 3, dtype: type[np.generic] = np.uint8) -> np.ndarray:
    """Decodes a picture of any mode.

    Args:
        path: The file.
        channels: 1 (grey), 3 (RGB) or more (the file must hold that many; the first three in RGB order).
        dtype: ``np.uint8`` or ``np.uint16``; other depths are converted.

    Returns:
        (H, W, channels) contiguous array.

    Raises:
        ImageError: Missing, empty or undecodable.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not data.size:
        raise ImageError(f"{path}: the file is empty")
    image = _decode_opencv(data, channels, dtype)
    if image is None:
        image = _decode_pillow(Path(path), channels)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.shape[2] != channels:
        raise ImageError(f"{path}: {image.shape[2]} channels, {channels} are expected")
    return np.ascontiguousarray(_to_depth(image, dtype))


def probe_image(path: str | Path) -> tuple[int, int]:
    """Height and width of a picture as displayed, without decoding it where its format allows a check of completeness.

    JPEG must end with its end marker (files with bytes behind it are decoded to find out), PNG chunks must have right checksums; all
    other formats are decoded.

    Raises:
        ImageError: Missing, empty, cut short, not a picture, or smaller than 10 px.
    """
    from PIL import Image

    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"{path}: the file is empty")
        with Image.open(path) as picture:
            width, height = picture.size
            if picture.format in ("JPEG", "MPO"):
                if picture.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSED:
                    width, height = height, width
                if not _has_jpeg_end(path):
                    picture.load()
            elif picture.format == "PNG":
                rotated = picture.info.get("exif") and picture.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSED
                picture.verify()
                if rotated:  # which not every OpenCV heeds in a PNG
                    height, width = read_image(path).shape[:2]
            else:
                picture.load()
                height, width = read_image(path).shape[:2]
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        height, width = _probe_opencv(path, error)
    if min(height, width) < MIN_SIDE_PX:
        raise ImageError(f"{path}: {width}x{height} px, at least {MIN_SIDE_PX} px a side are needed")
    return height, width


def is_image(path: str | Path) -> bool:
    """Whether the file name looks like a picture's (``._name``, which macOS leaves on other disks, does not)."""
    path = Path(path)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("._")


def _probe_opencv(path: Path, error: Exception) -> tuple[int, int]:
    """Size of a picture that Pillow refuses: OpenCV decides, except about files that are cut short, which it fills with grey."""
    text = " ".join(str(error).split())
    if "truncated" in text.lower() or "broken" in text.lower():
        raise ImageError(f"{path}: the file is cut short or damaged ({text})") from error
    image = _decode_opencv(np.fromfile(path, dtype=np.uint8), 3, np.uint8)
    if image is None:
        raise ImageError(f"{path}: not a picture that can be read") from error
    return image.shape[0], image.shape[1]


def _has_jpeg_end(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-2, 2)
        return file.read(2) == b"\xff\xd9"


def _decode_opencv(data: np.ndarray, channels: int, dtype: type[np.generic]) -> np.ndarray | None:
    """(H, W) or (H, W, C) in RGB order, or None where OpenCV cannot."""
    if channels == 1:
        flag = cv2.IMREAD_GRAYSCALE
    elif channels == 3:
        flag = cv2.IMREAD_COLOR
    else:
        flag = cv2.IMREAD_UNCHANGED
    if dtype == np.uint16 and channels in (1, 3):
        flag |= cv2.IMREAD_ANYDEPTH
    rgb_flag = getattr(cv2, "IMREAD_COLOR_RGB", None)  # newer OpenCV decodes to RGB at no cost
    direct = channels == 3 and dtype == np.uint8 and rgb_flag is not None
    try:
        image = cv2.imdecode(data, rgb_flag if direct else flag)
    except cv2.error:
        return None
    if image is None or image.dtype not in (np.uint8, np.uint16):
        return None
    if image.ndim == 3 and not direct:
        code = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}.get(image.shape[2])
        image = image if code is None else cv2.cvtColor(image, code)
    return image


def _decode_pillow(path: Path, channels: int) -> np.ndarray:
    """The same with Pillow, for the formats and modes that OpenCV leaves out."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
                grey = np.asarray(picture)
                return np.repeat(_to_depth(grey, np.uint8)[:, :, None], channels, axis=2)
            if channels in (1, 3):
                picture = picture.convert("RGB" if channels == 3 else "L")
            return np.array(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: not a picture that can be read ({' '.join(str(error).split())})") from error


def _to_depth(image: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """Integer depths by their full range; floats and wider integers by 0-1, 0-255 or 0-65535, whichever holds their maximum."""
    if image.dtype == dtype:
        return image
    top = float(np.iinfo(dtype).max)
    if image.dtype == np.uint8:
        return image.astype(np.uint16) * np.uint16(257)
    if image.dtype == np.uint16:
        return (image >> 8).astype(np.uint8)
    values = np.nan_to_num(image.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    peak = float(values.max(initial=0.0))
    full = 1.0 if peak <= 1.0 and image.dtype.kind == "f" else 255.0 if peak <= 255.0 else max(65535.0, peak)
    return (np.clip(values / full, 0.0, 1.0) * top).round().astype(dtype)
