"""A font made of the characters that OpenCV has within it, for machines without a font for Chinese, Japanese or Korean.

OpenCV 5 draws these by itself, but gives no font file that matplotlib could read. So the few characters that names need are drawn large,
their outlines traced, and a TrueType file written that holds these alone. Older versions of OpenCV have no such font.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

EM = 1024  # units of the font file to the height of its em
PX = 256  # height of the em where a character is drawn to be traced
BASELINE_PX, MARGIN_PX = 320, 128
MOST_CHARACTERS = 4096
NUMBERS = itertools.count(1)  # of the files of this process


class TracedFont(NamedTuple):
    """A font file and what it holds."""

    path: Path
    characters: frozenset[str]


class Glyph(NamedTuple):
    """A character's outlines in font units, y upwards, and how far the next one stands."""

    outlines: tuple[NDArray[np.int64], ...]  # (k, 2) each
    advance: int


@cache
def traced_font(characters: frozenset[str]) -> TracedFont | None:
    """A TrueType file with these characters, as far as OpenCV's own font has them; None where it has none."""
    if not hasattr(cv2, "FontFace"):
        return None
    face: Any = cv2.FontFace("uni")
    absent = [_drawn(face, "?"), _drawn(face, "\U0010fffd")]  # how a character without glyph looks: a question mark or a stroke
    glyphs: dict[str, Glyph] = {}
    for c in sorted(characters)[:MOST_CHARACTERS]:
        image = _drawn(face, c)
        if image.any() and not any(np.array_equal(image, other) for other in absent):
            glyphs[c] = Glyph(_outlines(image), _advance(face, c))
    return TracedFont(_write(glyphs), frozenset(glyphs)) if glyphs else None


def _drawn(face: Any, c: str) -> NDArray[np.uint8]:
    image = np.zeros((BASELINE_PX + MARGIN_PX, PX + 3 * MARGIN_PX, 3), np.uint8)
    cv2.putText(image, c, (MARGIN_PX, BASELINE_PX), (255, 255, 255), face, PX)  # type: ignore[call-overload]
    return np.ascontiguousarray(image[:, :, 0])


def _advance(face: Any, c: str) -> int:
    """From the start of one character to that of the next, in font units: what two of them are wider than one."""
    once, twice = (cv2.getTextSize((0, 0), c * n, (0, 0), face, PX)[2] for n in (1, 2))  # type: ignore[call-overload,index,misc]
    return round((twice - once) * EM / PX)


def _outlines(image: NDArray[np.uint8]) -> tuple[NDArray[np.int64], ...]:
    """Outer outlines clockwise and holes the other way, as TrueType fills them."""
    large = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    found, _ = cv2.findContours((large > 127).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    outlines = []
    for contour in found:  # OpenCV walks outer outlines one way and holes the other
        points = cv2.approxPolyDP(contour, 0.8, True)[:, 0]
        if len(points) > 2:
            xy = points / 2 - (MARGIN_PX, BASELINE_PX)
            outlines.append((xy * (EM / PX, -EM / PX)).round().astype(np.int64))
    return tuple(outlines)


def _write(glyphs: Mapping[str, Glyph]) -> Path:
    """The file, in a folder that lasts as long as the process."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    names = {c: f"u{ord(c):05X}" for c in glyphs}
    tables = {".notdef": TTGlyphPen(None).glyph()}
    for c, glyph in glyphs.items():
        pen = TTGlyphPen(None)
        for outline in glyph.outlines:
            pen.moveTo(tuple(outline[0].tolist()))
            for point in outline[1:].tolist():
                pen.lineTo(tuple(point))
            pen.closePath()
        tables[names[c]] = pen.glyph()
    file = Path(_folder().name) / f"Traced{next(NUMBERS)}.ttf"
    builder = FontBuilder(EM, isTTF=True)
    builder.setupGlyphOrder(list(tables))
    builder.setupCharacterMap({ord(c): name for c, name in names.items()})
    builder.setupGlyf(tables)
    widths = {".notdef": EM // 2, **{names[c]: glyph.advance for c, glyph in glyphs.items()}}
    bearings = builder.font["glyf"]
    builder.setupHorizontalMetrics({name: (width, getattr(bearings[name], "xMin", 0)) for name, width in widths.items()})
    builder.setupHorizontalHeader(ascent=round(0.95 * EM), descent=-round(0.25 * EM))
    builder.setupNameTable({"familyName": file.stem, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=round(0.95 * EM), sTypoDescender=-round(0.25 * EM), usWinAscent=EM, usWinDescent=EM // 4)
    builder.setupPost()
    builder.save(str(file))
    return file


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="traced-fonts-")  # removed when the process ends
