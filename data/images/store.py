"""Decoded images at training size, cached: all of them in memory (ram) or in files (disk), else those that were used last.

The cache changes the speed and never the result.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from tqdm import tqdm

from data.images.pixels import covering_size, resized, resized_smoothly
from data.images.reading import ImageError, read_image
from utils.files import atomic_write

RECENT_BYTES = 256 * 2**20  # of decoded images that each process caches

Result = TypeVar("Result")


class ImageStore:
    """Images by number, each resized so that its longer side is ``imgsz`` px.

    Args:
        files: N images.
        imgsz: longer side in px.
        channels: of the images.
        dtype: ``np.uint8`` or ``np.uint16``.
        smooth: shrink by area, as validation does; else large JPEG files are decoded at a reduced scale and the rest is bilinear.
        recent_bytes: of decoded images used last that this process caches.
        cover: for crops: images are only shrunk, the shorter side to ``imgsz`` if ``smooth``, else to twice that, so that a random part of
            one is still sharp.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        imgsz: int,
        channels: int = 3,
        dtype: type[np.generic] = np.uint8,
        smooth: bool = False,
        recent_bytes: int = RECENT_BYTES,
        cover: bool = False,
    ) -> None:
        self.files, self.imgsz, self.channels, self.dtype = tuple(files), imgsz, channels, dtype
        self.smooth, self.recent_limit, self.cover = smooth, recent_bytes, cover
        self.all: list[np.ndarray | None] = []
        self.on_disk = False
        self.recent: OrderedDict[int, np.ndarray] = OrderedDict()
        self.recent_bytes = 0

    def get(self, i: int) -> np.ndarray:
        """(h, w, C) image i, shared: it must not be modified.

        Raises:
            ImageError: it cannot be decoded.
        """
        cached = self.all[i] if self.all else None
        if cached is not None:
            return cached
        if i in self.recent:
            self.recent.move_to_end(i)
            return self.recent[i]
        image = self._from_disk(i) if self.on_disk else None
        image = self.decode(i) if image is None else image
        self.recent[i] = image
        self.recent_bytes += image.nbytes
        while self.recent_bytes > self.recent_limit:
            self.recent_bytes -= self.recent.popitem(last=False)[1].nbytes
        return image

    def decode(self, i: int) -> np.ndarray:
        """Image i from its file."""
        if self.cover:
            return self._decode_to_cover(i)
        least_side = 0 if self.smooth else self.imgsz
        image = read_image(self.files[i], channels=self.channels, dtype=self.dtype, least_side=least_side)
        h, w = image.shape[:2]
        ratio = self.imgsz / max(h, w)
        size = (max(round(w * ratio), 1), max(round(h * ratio), 1))
        if size == (w, h):
            return image
        interpolation = cv2.INTER_AREA if self.smooth and ratio < 1 else cv2.INTER_LINEAR
        return resized(image, size, interpolation=interpolation)

    def _decode_to_cover(self, i: int) -> np.ndarray:
        image = read_image(self.files[i], channels=self.channels, dtype=self.dtype)
        side = self.imgsz if self.smooth else 2 * self.imgsz
        hw = (image.shape[0], image.shape[1])
        return image if min(hw) <= side else resized_smoothly(image, covering_size(hw, (side, side)))

    def original(self, path: str) -> np.ndarray:
        """(H, W, C) an image at its own size, in the data set's channels and depth; not cached."""
        return read_image(path, channels=self.channels, dtype=self.dtype)

    def keep_in_ram(self, *, processes: int = 1, prefix: str = "", progress: bool = True) -> str:
        """Decodes all images if they fit in half of the free memory; returns a message where they do not.

        Args:
            processes: number of processes that cache all images.
            prefix: words before messages and the progress bar.
            progress: whether to show it.
        """
        sample = [self._decode_or_none(i) for i in range(0, len(self.files), max(1, len(self.files) // 16))]
        sizes = [s.nbytes for s in sample if s is not None]
        need, free = int(np.mean(sizes or [0])) * len(self.files) * processes, free_memory()
        if need > free / 2:
            return f"{prefix}--cache ram: {need / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free, images are not cached"
        self.all = self._map(self._decode_or_none, f"{prefix}caching images in memory", progress)
        return ""

    def keep_on_disk(self, *, prefix: str = "", progress: bool = True) -> str:
        """Writes ``<image>.<imgsz>….npy`` beside each image, unless it exists and is newer; returns a message where that fails."""
        try:
            self._map(self._to_disk, f"{prefix}caching images on disk", progress)
        except OSError as error:
            folder = Path(self.files[0]).parent
            return f"{prefix}--cache disk: {folder} cannot be written ({error.strerror or error}), images are not cached"
        self.on_disk = True
        return ""

    def _map(self, function: Callable[[int], Result], title: str, progress: bool) -> list[Result]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            work = pool.map(function, range(len(self.files)))
            return list(tqdm(work, total=len(self.files), desc=title, unit="image", disable=not progress, leave=False))

    def _decode_or_none(self, i: int) -> np.ndarray | None:
        try:
            return self.decode(i)
        except ImageError:
            return None  # reported when the loader reads it

    def _disk_path(self, i: int) -> Path:
        kind, depth = ("c" if self.cover else "") + ("a" if self.smooth else "r"), "" if self.dtype == np.uint8 else "w"
        return Path(f"{self.files[i]}.{self.imgsz}{kind}{self.channels}{depth}.npy")  # data/images/bands.py recognises these names

    def _to_disk(self, i: int) -> None:
        path = self._disk_path(i)
        if self._from_disk(i) is not None:
            return
        image = self._decode_or_none(i)
        if image is None:
            return
        with atomic_write(path) as partial, open(partial, "wb") as file:
            np.save(file, image, allow_pickle=False)

    def _from_disk(self, i: int) -> np.ndarray | None:
        path = self._disk_path(i)
        try:
            if path.stat().st_mtime_ns < os.stat(self.files[i]).st_mtime_ns:
                return None
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None


def free_memory() -> float:
    """Bytes of memory available without swapping; infinite where the system does not report them."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return float(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float("inf")
