"""TIFF files without conversion: all pages, any number of samples a pixel, in one plane or several, 8 and 16 bits and floats.

OpenCV reads at most four samples, confuses planes and multiplies colours by alpha; Pillow reduces 16 bits to 8. So the directory is read
here, and the samples are passed to OpenCV, that is libtiff, as grey images of the same bytes: it decompresses them, and nothing else.
See "TIFF, Revision 6.0" (Adobe, 1992) for tags and predictors.

The package ``tifffile`` (2026.3) is not used: it needs ``imagecodecs``, a second and large binary package, for LZW, which most programs
write; it allocates an array of the size that a header claims before it checks that the file has as many bytes; and it needs
Python 3.11, where this project supports 3.10.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from data.images.orientation import TAG as ORIENTATION
from data.images.orientation import upright
from utils.reading.limits import MAX_PAGE_BYTES

WIDTH, HEIGHT, BITS, COMPRESSION, OFFSETS, SAMPLES, STRIP_ROWS, COUNTS = 256, 257, 258, 259, 273, 277, 278, 279
PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS, FORMAT = 284, 317, 322, 323, 324, 325, 339
KIND, PHOTOMETRIC = 254, 262
TAGS = frozenset(
    (WIDTH, HEIGHT, BITS, COMPRESSION, OFFSETS, SAMPLES, STRIP_ROWS, COUNTS, PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS)
    + (TILE_COUNTS, FORMAT, KIND, ORIENTATION)
)
SHORT, LONG = 3, 4
TYPES = {1: "B", SHORT: "H", LONG: "I"}  # those that the tags above may have
DTYPES = {(1, 8): np.uint8, (1, 16): np.uint16, (2, 16): np.int16, (3, 32): np.float32}  # by sample format and bits
COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32773: "PackBits", 32946: "deflate"}
NO_PREDICTOR, HORIZONTAL = 1, 2
REDUCED_OR_MASK = 0b101  # pages that are a smaller copy or a mask of another
MAX_PAGES, MAX_TAGS, MAX_VALUES = 1024, 2**16, 2**20  # of a file, of all its pages, of a tag


class TiffError(ValueError):
    """A TIFF that is damaged, or of a kind that is not read; the message says which."""


def is_tiff(data: np.ndarray) -> bool:
    """Whether bytes begin as those of a TIFF do."""
    return data[:4].tobytes() in (b"II*\0", b"MM\0*")


def opencv_misreads(data: np.ndarray) -> bool:
    """Whether OpenCV misreads a file's first page or refuses it: a TIFF of more than four samples, or of 16 bits in several planes."""
    if not is_tiff(data):
        return False
    try:
        tags = next(_directories(memoryview(data.data), _order(data)))
    except (struct.error, StopIteration, TiffError):
        return False
    samples, deep = tags.get(SAMPLES, (1,))[0], max(tags.get(BITS, (1,))) > 8
    return samples > 4 or (deep and samples > 1 and tags.get(PLANAR, (1,))[0] == 2)


def read_first_page(data: np.ndarray, *, samples: Collection[int], channels: int) -> np.ndarray:
    """The first page (H, W, samples) that is no smaller copy or mask; others are not looked at.

    Args:
        data: (n,) uint8, the whole file.
        samples: numbers of samples that can be converted to ``channels``; others are refused undecoded.
        channels: for the message.

    Raises:
        TiffError: as ``read_pages``, or of another number of samples.
    """
    (tags,), order = _pages(data, first_only=True), _order(data)
    count = tags.get(SAMPLES, (1,))[0]
    if count not in samples:
        raise TiffError(f"{count} channels, {channels} are expected")
    return _read_page(data, tags, order)


def read_pages(data: np.ndarray, *, channels: int | None = None) -> list[np.ndarray]:
    """All pages, each (H, W, samples) of its own depth and upright; smaller copies and masks of other pages are left out.

    Args:
        data: (n,) uint8, the whole file.
        channels: that all pages should have together; the first page alone is read if it has that many. None: whatever they have.

    Raises:
        TiffError: damaged, too large, of another number of channels, or a compression or sample format that is not read.
    """
    pages = _pages(data, first_only=False)
    counts = [tags.get(SAMPLES, (1,))[0] for tags in pages]
    if channels is not None and counts[0] == channels:
        pages = pages[:1]
    elif channels is not None and sum(counts) != channels:  # undecoded: a small file may have thousands of large pages
        if len({(tags.get(WIDTH), tags.get(HEIGHT)) for tags in pages}) > 1:
            raise pages_differ(len(pages), counts[0], channels)
        raise TiffError(f"{sum(counts)} channels, {channels} are expected")
    return [_read_page(data, tags, _order(data)) for tags in pages]


def pages_differ(pages: int, first: int, channels: int) -> TiffError:
    """What is raised for pages of several sizes, the first of which has too few channels."""
    return TiffError(f"its {pages} pages differ in size, and the first has {first} channels, not {channels}")


def without_other_pages(data: np.ndarray) -> np.ndarray:
    """A TIFF whose first directory is its last, so that no reader looks at what follows; other files unchanged."""
    if not is_tiff(data):
        return data
    try:
        end = _end_of_first(memoryview(data.data), _order(data))
        if not data[end : end + 4].any():
            return data
    except struct.error:
        return data
    out = data.copy()
    out[end : end + 4] = 0
    return out


def _order(data: np.ndarray) -> str:
    return "<" if data[0] == ord("I") else ">"


def _pages(data: np.ndarray, *, first_only: bool) -> list[dict[int, tuple[int, ...]]]:
    """The tags of all pages but smaller copies and masks, or of the first of these."""
    found: list[dict[int, tuple[int, ...]]] = []
    try:
        for tags in _directories(memoryview(data.data), _order(data)):
            if not tags.get(KIND, (0,))[0] & REDUCED_OR_MASK:
                found.append(tags)
                if first_only:
                    break
    except struct.error as error:
        raise TiffError("the file is cut short or damaged (its directory cannot be read)") from error
    if not found:
        raise TiffError("a TIFF without pages")
    return found


def _end_of_first(data: memoryview, order: str) -> int:
    """Where the position of the second directory is."""
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    end: int = start + 2 + 12 * count
    struct.unpack_from(f"{order}I", data, end)
    return end


@dataclass(frozen=True)
class _Layout:
    """How the samples of a page lie in the file."""

    width: int
    height: int
    samples: int
    planes: int  # 1: the samples of a pixel lie together
    dtype: np.dtype
    compression: int
    predictor: int
    tile_wh: tuple[int, int] | None
    strip_rows: int
    offsets: tuple[int, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(tags: dict[int, tuple[int, ...]]) -> _Layout:
        """Raises TiffError for what is not read."""
        samples, bits = tags.get(SAMPLES, (1,))[0], set(tags.get(BITS, (1,)))
        formats = set(tags.get(FORMAT, (1,)))
        compression, predictor = tags.get(COMPRESSION, (1,))[0], tags.get(PREDICTOR, (NO_PREDICTOR,))[0]
        dtype = DTYPES.get((min(formats), min(bits)))
        if len(bits) != 1 or len(formats) != 1 or dtype is None:
            raise TiffError(f"samples of {'/'.join(map(str, sorted(bits)))} bits, 8 and 16 bits and 32-bit floats can be read")
        if compression not in COMPRESSIONS:
            known = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
            raise TiffError(f"TIFF compression {compression} with {samples} channels is not read; save it with one of {known}")
        if predictor not in (NO_PREDICTOR, HORIZONTAL) or (predictor == HORIZONTAL and np.dtype(dtype).kind == "f"):
            raise TiffError(f"TIFF predictor {predictor} is not read; save it with predictor 1, or 2 for integers")
        tiled = TILE_WIDTH in tags
        height = tags[HEIGHT][0]
        return _Layout(
            tags[WIDTH][0], height, samples, samples if tags.get(PLANAR, (1,))[0] == 2 else 1, np.dtype(dtype), compression, predictor,
            (tags[TILE_WIDTH][0], tags[TILE_HEIGHT][0]) if tiled else None, min(tags.get(STRIP_ROWS, (height,))[0], height),
            tags[TILE_OFFSETS if tiled else OFFSETS], tags[TILE_COUNTS if tiled else COUNTS],
        )  # fmt: skip


def _read_page(data: np.ndarray, tags: dict[int, tuple[int, ...]], order: str) -> np.ndarray:
    try:
        layout = _Layout.of(tags)
    except (IndexError, KeyError) as error:
        raise TiffError("the file is cut short or damaged (its directory cannot be read)") from error
    if layout.width * layout.height * layout.samples * layout.dtype.itemsize > MAX_PAGE_BYTES:
        raise TiffError(f"a page of {layout.width}x{layout.height} px with {layout.samples} channels, larger than is read")
    if any(start + size > len(data) for start, size in zip(layout.offsets, layout.counts)):
        raise TiffError("the file is cut short or damaged (pixels are missing)")
    samples = layout.samples // layout.planes
    planes = [_read_plane(data, layout, plane, samples, order) for plane in range(layout.planes)]
    page = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
    return upright(page, tags.get(ORIENTATION, (1,))[0])


def _read_plane(data: np.ndarray, layout: _Layout, plane: int, samples: int, order: str) -> np.ndarray:
    """One plane (H, W, samples): its strips, or tiles one below the other, as a grey image that is ``samples`` times as wide."""
    share = len(layout.offsets) // layout.planes
    part = slice(plane * share, (plane + 1) * share)
    tile_w, tile_h = layout.tile_wh or (layout.width, layout.strip_rows)
    across, down = -(-layout.width // max(tile_w, 1)), -(-layout.height // max(tile_h, 1))
    if share != across * down or not share:
        raise TiffError("the file is damaged (strips or tiles are missing)")
    rows = share * tile_h if layout.tile_wh else layout.height  # tiles are always complete, the last strip need not be
    tags: dict[int, tuple[int, ...]] = {
        WIDTH: (tile_w * samples,), HEIGHT: (rows,), STRIP_ROWS: (tile_h,), BITS: (8 * layout.dtype.itemsize,), PHOTOMETRIC: (1,),
        SAMPLES: (1,), FORMAT: (3 if layout.dtype.kind == "f" else 1,), COMPRESSION: (layout.compression,),
        OFFSETS: layout.offsets[part], COUNTS: layout.counts[part],
    }  # fmt: skip
    try:
        grey = cv2.imdecode(_with_directory(data, tags, order), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:  # larger than it accepts
        raise TiffError(f"OpenCV cannot read a TIFF of {layout.width}x{layout.height} px with {layout.samples} channels") from error
    if grey is None or grey.shape != (rows, tile_w * samples) or grey.dtype.itemsize != layout.dtype.itemsize:
        raise TiffError(f"the file is damaged ({COMPRESSIONS[layout.compression]} compression: it cannot be unpacked)")
    values = grey.reshape(rows, tile_w, samples)
    if layout.predictor == HORIZONTAL:
        values = np.cumsum(values, axis=1, dtype=values.dtype)  # the differences wrap around, and so does their sum
    if layout.tile_wh:
        values = values.reshape(down, across, tile_h, tile_w, samples).swapaxes(1, 2).reshape(down * tile_h, across * tile_w, samples)
    return values[: layout.height, : layout.width].view(layout.dtype)


def _with_directory(data: np.ndarray, tags: dict[int, tuple[int, ...]], order: str) -> np.ndarray:
    """The file with another first directory appended, whose numbers are all LONG."""
    start = len(data) + len(data) % 2
    values_at = start + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, values = struct.pack(f"{order}I", values_at + len(values)), values + packed
        entries += struct.pack(f"{order}HHI", tag, LONG, len(numbers)) + packed
    directory = struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0) + values
    padding = bytes(start - len(data))
    out = np.concatenate((data, np.frombuffer(padding + directory, np.uint8)))
    out[4:8] = np.frombuffer(struct.pack(f"{order}I", start), np.uint8)
    return out


def _directories(data: memoryview, order: str) -> Iterator[dict[int, tuple[int, ...]]]:
    """The tags of TAGS, page after page; ends where the directories of a damaged file form a cycle."""
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    visited: set[int] = set()
    left = MAX_TAGS
    while start and start not in visited and len(visited) < MAX_PAGES:
        visited.add(start)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        left -= count
        if left < 0:
            raise TiffError(f"more than the {MAX_TAGS} tags that are read")
        entries = (struct.unpack_from(f"{order}HHI", data, start + 2 + 12 * i) for i in range(count))
        tags = {}
        for i, (tag, kind, length) in enumerate(entries):
            if tag in TAGS and tag not in tags and kind in TYPES and 0 < length <= MAX_VALUES:
                at = start + 2 + 12 * i + 8
                if struct.calcsize(TYPES[kind]) * length > 4:
                    (at,) = struct.unpack_from(f"{order}I", data, at)
                tags[tag] = struct.unpack_from(f"{order}{length}{TYPES[kind]}", data, at)
        yield tags
        (start,) = struct.unpack_from(f"{order}I", data, start + 2 + 12 * count)
