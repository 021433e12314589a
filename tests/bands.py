"""Small data sets of images with any number of channels and 8 or 16 bits, one square each."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np


def write_tiff(
    path: Path, pages: Sequence[np.ndarray], *, planar: bool = False, alpha: bool = False, tile: int = 0, order: str = "<",
    orientation: int = 1,
) -> Path:  # fmt: skip
    """Writes an uncompressed TIFF of pages (H, W, C), uint8 or uint16, with layouts that the installed libraries cannot write.

    Args:
        planar: each channel in a plane of its own.
        alpha: mark extra channels as alpha, by which readers multiply the colours.
        tile: side of square tiles in px, a multiple of 16; 0 for one strip.
        order: byte order, ``<`` or ``>``.
        orientation: EXIF orientation, 1 to 8.
    """
    out = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
    link = 4  # position of the offset of the next directory
    for page in pages:
        h, w, c = page.shape
        planes = page.transpose(2, 0, 1)[..., None] if planar else page[None]  # (planes, H, W, samples)
        chunks = [chunk for plane in planes for chunk in _chunks(plane, tile)]
        offsets = []
        for chunk in chunks:
            offsets.append(len(out))
            out += chunk.astype(page.dtype.newbyteorder(order)).tobytes()
            out += bytes(len(out) % 2)
        extra = max(c - (3 if c >= 3 else 1), 0)
        tags: dict[int, tuple[str, Sequence[int]]] = {
            256: ("I", [w]), 257: ("I", [h]), 258: ("H", [8 * page.dtype.itemsize] * c), 259: ("H", [1]), 262: ("H", [2 if c >= 3 else 1]),
            277: ("H", [c]), 284: ("H", [1 + planar]),
        }  # fmt: skip
        sizes = [chunk.nbytes for chunk in chunks]
        tags |= {322: ("I", [tile]), 323: ("I", [tile]), 324: ("I", offsets), 325: ("I", sizes)} if tile else {}
        tags |= {} if tile else {273: ("I", offsets), 278: ("I", [h]), 279: ("I", sizes)}
        tags |= {274: ("H", [orientation])} if orientation > 1 else {}
        tags |= {338: ("H", [2 if alpha else 0] * extra)} if extra else {}
        values = {tag: struct.pack(f"{order}{len(numbers)}{kind}", *numbers) for tag, (kind, numbers) in tags.items()}
        for tag, packed in values.items():
            if len(packed) > 4:
                values[tag] = struct.pack(f"{order}I", len(out))
                out += packed + bytes(len(packed) % 2)
        struct.pack_into(f"{order}I", out, link, len(out))
        out += struct.pack(f"{order}H", len(tags))
        for tag in sorted(tags):
            kind, numbers = tags[tag]
            out += struct.pack(f"{order}HHI", tag, 3 if kind == "H" else 4, len(numbers)) + values[tag].ljust(4, b"\0")
        link = len(out)
        out += bytes(4)
    path.write_bytes(out)
    return path


def _chunks(plane: np.ndarray, tile: int) -> list[np.ndarray]:
    if not tile:
        return [plane]
    h, w = plane.shape[:2]
    padded = np.pad(plane, ((0, -h % tile), (0, -w % tile), (0, 0)))
    return [padded[y : y + tile, x : x + tile] for y in range(0, h, tile) for x in range(0, w, tile)]


def write_image(path: Path, image: np.ndarray) -> Path:
    """Writes an image (H, W, C): .png of 1, 3 or 4 channels (RGB order), multi-page .tif (one page per channel) or .npy."""
    if path.suffix == ".tif":
        return write_tiff(path, [image[:, :, i : i + 1] for i in range(image.shape[2])])
    if path.suffix == ".npy":
        np.save(path, image)
        return path
    code = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}.get(image.shape[2])
    path.write_bytes(cv2.imencode(path.suffix, image if code is None else cv2.cvtColor(image, code))[1].tobytes())
    return path


def square_image(rng: np.random.Generator, channels: int, dtype: type[np.generic], label: int) -> tuple[np.ndarray, str]:
    """A noisy image (64, 64, C) with a bright or dark square of a different value in every channel, and its label row."""
    x, y = rng.integers(4, 36, 2)  # drawn first, so that it does not depend on the number of channels
    image = rng.uniform(0.25, 0.45, (64, 64, channels))
    image[y : y + 24, x : x + 24] = np.linspace(0.9, 0.75, channels) if label else np.linspace(0.0, 0.1, channels)
    top = np.iinfo(dtype).max
    return (image * top).astype(dtype), f"{label} {(x + 12) / 64} {(y + 12) / 64} {24 / 64} {24 / 64}\n"


def write_squares(
    root: Path, *, channels: int, dtype: type[np.generic], suffix: str, train: int = 12, val: int = 4, ch: bool = True
) -> Path:
    """Writes a data set of square images; returns its YAML, which has the key ``ch`` if ``ch``."""
    for split, count in (("train", train), ("val", val)):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            image, row = square_image(np.random.default_rng((count, i)), channels, dtype, i % 2)
            write_image(root / "images" / split / f"{i}{suffix}", image)
            (root / "labels" / split / f"{i}.txt").write_text(row)
    named = f"ch: {channels}\n" if ch else ""
    path = root / "data.yaml"
    path.write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: [dark, bright]\n{named}")
    return path
