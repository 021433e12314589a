"""Masks as COCO's run-length codes: small enough to keep those of a whole data set, and compared without being unpacked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from utils.masks.packed import Extents, Packed, packed_width, unpack

if TYPE_CHECKING:
    from utils.metrics.matching import Objects

Code = Mapping[str, Any]  # {"size": [height, width], "counts": bytes}
FIELD = "masks"
MOST_DIGITS = 7  # of five bits, of a run length that fits into 32
HEADER = 8  # bytes of a code as a row: height and width as int32


def encode(masks: NDArray[np.uint8]) -> NDArray[np.object_]:
    """Masks (n, h, w) of 0 and 1 to n codes."""
    from pycocotools import mask as coco_mask

    codes = np.empty(len(masks), dtype=object)
    if len(masks):
        codes[:] = coco_mask.encode(np.asfortranarray(masks.astype(np.uint8).transpose(1, 2, 0)))
    return codes


def encode_packed(
    packed: Packed, width: int, *, within: tuple[int, int] | None = None, at_xy: tuple[int, int] = (0, 0)
) -> NDArray[np.object_]:
    """Packed masks (n, h, ceil(width / 8)) to n codes; only the window about each mask is looked at.

    Args:
        within: Height and width in px of an image that the masks are a part of, and that the codes are of; the masks' own if None.
        at_xy: Where their upper left corner is in it, px.
    """
    (height, width), extents = within or (packed.shape[1], width), Extents.of(packed)
    runs = [_runs(mask, *extents.window(i), hw=(height, width), at_xy=at_xy) for i, mask in enumerate(packed)]
    codes = np.empty(len(packed), dtype=object)
    codes[:] = [{"size": [height, width], "counts": text} for text in _compressed(runs)]
    return codes


def decode_packed(codes: Sequence[Code] | NDArray[np.object_], hw: tuple[int, int]) -> Packed:
    """The inverse of ``encode_packed``: codes to masks (n, h, ceil(w / 8)); only the columns that each covers are looked at."""
    height, width = hw
    packed = np.zeros((len(codes), height, packed_width(width)), np.uint8)
    for mask, code in zip(packed, codes):
        runs = _run_lengths(np.frombuffer(_as_bytes(code["counts"]), np.uint8))
        runs = runs[: len(runs) // 2 * 2]  # what comes after the last ones are zeros
        if not runs[1::2].any():
            continue
        first, last = runs[0] // height // 8 * 8, -(-int(runs.sum()) // height)
        runs[0] -= first * height
        bits = np.zeros((last - first) * height, np.uint8)
        bits[: runs.sum()] = np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs)
        bits = bits.reshape(last - first, height)
        mask[:, first // 8 : packed_width(last)] = np.packbits(np.ascontiguousarray(bits.T), axis=1)
    return packed


def united(codes: Sequence[Code]) -> Code:
    """The code of all that some masks of one image cover."""
    from pycocotools import mask as coco_mask

    return coco_mask.merge(list(codes))


def _runs(mask: NDArray[np.uint8], rows: slice, columns: slice, *, hw: tuple[int, int], at_xy: tuple[int, int]) -> NDArray[np.int64]:
    """Run lengths of one packed mask (h, ·), column after column, zeros first, in an image of ``hw`` px that it is at ``at_xy`` of."""
    height, width = hw
    bits = np.unpackbits(mask[rows, columns], axis=1)
    tall = bits.shape[0] + 1
    lined = np.zeros((bits.shape[1], tall), np.uint8)  # a zero below every column, so that none runs into the next
    lined[:, :-1] = bits.T
    flat = lined.reshape(-1)
    edges = np.flatnonzero(np.diff(flat, prepend=np.uint8(0)))
    column, row = edges // tall, edges % tall
    edges = (8 * columns.start + column + at_xy[0]) * height + rows.start + row + at_xy[1]
    if tall > height and len(edges) > 2:  # full height: a run goes on at the top of the next column
        kept = np.ones(len(edges), bool)
        touching = np.flatnonzero(edges[1:-1:2] == edges[2::2])
        kept[1 + 2 * touching] = kept[2 + 2 * touching] = False
        edges = edges[kept]
    ends = np.concatenate(([0], edges, [height * width]))
    runs = np.diff(ends)
    return runs if len(runs) == 1 or runs[-1] else runs[:-1]


def _compressed(runs: Sequence[NDArray[np.int64]]) -> list[bytes]:
    """Run lengths as COCO writes them: from the fourth on as the difference to the one before the last, in digits of five bits, the
    lowest first; all codes at once."""
    if not len(runs):
        return []
    sizes = np.array([len(r) for r in runs])
    starts = np.cumsum(sizes) - sizes
    values = np.concatenate(runs)
    place = np.arange(len(values)) - np.repeat(starts, sizes)
    values = values - np.where(place > 2, np.roll(values, 2), 0)
    digits, used = np.zeros((len(values), MOST_DIGITS), np.uint8), np.zeros((len(values), MOST_DIGITS), bool)
    more = np.ones(len(values), bool)
    for digit in range(MOST_DIGITS):
        low = values & 0x1F
        values = values >> 5
        used[:, digit] = more
        more = more & np.where(low & 0x10, values != -1, values != 0)
        digits[:, digit] = low + 48 + 0x20 * more
    text, ends = digits[used].tobytes(), np.concatenate(([0], np.cumsum(used.sum(axis=1))))
    bounds = ends[np.append(starts, len(values))].tolist()
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def codes_to_rows(codes: Sequence[Code] | NDArray[np.object_]) -> NDArray[np.uint8]:
    """Codes as bytes (n, ·), zeros after the shorter ones: an array of numbers, which travels with a batch."""
    texts = [np.array(code["size"], "<i4").tobytes() + _as_bytes(code["counts"]) for code in codes]
    longest = max(map(len, texts), default=HEADER)
    return np.frombuffer(b"".join(text.ljust(longest, b"\0") for text in texts), np.uint8).reshape(len(texts), longest)


def rows_to_codes(rows: NDArray[np.uint8]) -> NDArray[np.object_]:
    """The inverse of ``codes_to_rows``."""
    codes = np.empty(len(rows), dtype=object)
    sizes = np.ascontiguousarray(rows[:, :HEADER]).view("<i4").tolist() if len(rows) else []
    codes[:] = [{"size": size, "counts": row[HEADER:].tobytes().rstrip(b"\0")} for size, row in zip(sizes, rows)]
    return codes


def rows_at(rows: NDArray[np.uint8], hws: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Codes as rows, each in an image of height and width ``hws`` (n, 2): see ``fitted``."""
    given = np.ascontiguousarray(rows[:, :HEADER]).view("<i4")
    if not len(rows) or (given == hws).all():
        return rows
    return codes_to_rows([fitted(code, (int(h), int(w))) for code, (h, w) in zip(rows_to_codes(rows), hws)]).copy()  # writable


def fitted(code: Code, hw: tuple[int, int]) -> Code:
    """The mask of a code in an image of another size: cut at its right and lower border, or filled up to it with nothing."""
    height, width = code["size"]
    if (height, width) == hw:
        return code
    mask = np.zeros(hw, np.uint8)
    kept = unpack(decode_packed([code], (height, width)), width)[0, : hw[0], : hw[1]]
    mask[: kept.shape[0], : kept.shape[1]] = kept
    return encode(mask[None])[0]  # type: ignore[no-any-return]


def joined_rows(parts: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Codes as rows from several places, each with its own longest."""
    longest = max((part.shape[1] for part in parts), default=HEADER)
    return np.concatenate([np.zeros((0, longest), np.uint8), *(np.pad(p, ((0, 0), (0, longest - p.shape[1]))) for p in parts)])


def _as_bytes(counts: str | bytes) -> bytes:
    return counts.encode() if isinstance(counts, str) else counts


def encode_polygons(polygons: Sequence[Sequence[float] | NDArray], hw: tuple[int, int]) -> Code:
    """One object in one or several pieces, each x1 y1 x2 y2 … in px, as COCO rasterises it."""
    from pycocotools import mask as coco_mask

    return coco_mask.merge(coco_mask.frPyObjects([list(map(float, piece)) for piece in polygons], *hw))


def areas(objects: Objects) -> NDArray[np.float64]:
    """The area (n,) of each object's mask in px²."""
    return areas_of(objects.fields.get(FIELD, ()))


def areas_of(codes: Sequence[Code] | NDArray[np.object_]) -> NDArray[np.float64]:
    """The area (n,) of the masks of codes in px²; pycocotools' own function overflows."""
    texts = [_as_bytes(code["counts"]) for code in codes]
    digits = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    if not len(digits):
        return np.zeros(len(texts))
    values, ends = digits_to_values(digits)
    owner = np.searchsorted(np.cumsum([len(text) for text in texts]), ends, side="right")
    first = np.searchsorted(owner, np.arange(len(texts)))  # of the values of each code
    odd = (np.arange(len(values)) - first[owner]) % 2 == 1  # lengths of ones, each as the difference to the one before
    values, owner = values[odd], owner[odd]
    total = np.cumsum(values)
    before = np.concatenate(([0], total))[np.searchsorted(owner, owner)]
    return np.bincount(owner, weights=total - before, minlength=len(texts)).astype(np.float64)


def digits_to_values(digits: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers out of COCO's digits (0 to 63, five bits each, the lowest first, a sixth for "more follow"), and where each ends."""
    ends = np.flatnonzero(digits & 0x20 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    place = np.arange(len(digits)) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 0x1F) << (5 * place), starts)
    return values - np.where(digits[ends] & 0x10 > 0, np.int64(1) << (5 * lengths), 0), ends


def _run_lengths(text: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The run lengths (zeros first) of a code's bytes."""
    if not len(text):
        return np.zeros(0, np.int64)
    lengths = digits_to_values(text.astype(np.int64) - 48)[0]
    for kind in (lengths[1::2], lengths[2::2]):  # the first run is no part of the differences
        np.cumsum(kind, out=kind)
    return lengths


def mask_overlap(dets: Objects, truth: Objects, d: NDArray, g: NDArray) -> NDArray[np.float64]:
    """Intersection over union of pairs of masks (over the detection's area for crowds), (p,): a :data:`utils.metrics.matching.Similarity`.

    Pairs come with all objects of a detection's group side by side; pycocotools compares one image at a time.
    """
    from pycocotools import mask as coco_mask

    found = np.zeros(len(d))
    image = dets.image[d]
    order = np.argsort(image, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(image[order])) + 1) if len(d) else ():
        det, det_place = np.unique(d[rows], return_inverse=True)
        obj, obj_place = np.unique(g[rows], return_inverse=True)
        codes = (list(dets.fields[FIELD][det]), list(truth.fields[FIELD][obj]))
        overlap = coco_mask.iou(*codes, truth.crowd[obj].astype(np.uint8).tolist())
        found[rows] = overlap[det_place, obj_place]
    return found
