"""One page with all figures of a run: self-contained, opens offline, needs no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

WIDEST_PX = 1600
QUALITY = 85
STYLE = """
body { font-family: system-ui, sans-serif; margin: 1.5rem auto; max-width: 1280px; padding: 0 1rem; color: #1b1b1b; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 0.3rem; overflow-wrap: anywhere; }
figure { margin: 0.6rem 0; } img { max-width: 100%; height: auto; border: 1px solid #ddd; }
figcaption, p { font-size: 0.85rem; color: #444; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 0.8rem; font-size: 0.85rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 0.85rem; } td, th { border: 1px solid #ccc; padding: 0.2rem 0.5rem; text-align: right; }
summary { cursor: pointer; font-size: 0.9rem; }
@media (prefers-color-scheme: dark) {
  body { background: #161616; color: #eee; } figcaption, p { color: #bbb; } img, td, th { border-color: #444; } a { color: #8ab4ff; }
}
"""


@dataclass
class Section:
    """One part of a page.

    Attributes:
        title: such as the name of an image.
        lines: of text.
        figures: files and their captions, shown at once.
        folded: the same, shown when they are opened.
        table: rows of cells, the first the header; empty for none.
    """

    title: str
    lines: list[str] = field(default_factory=list)
    figures: list[tuple[Path, str]] = field(default_factory=list)
    folded: list[tuple[Path, str]] = field(default_factory=list)
    table: Sequence[Sequence[str]] = ()


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the page; figures that are not there any more are left out."""
    links = "".join(f'<a href="#s{i}">{html.escape(section.title)}</a>' for i, section in enumerate(sections)) if len(sections) > 1 else ""
    body = "\n".join(_section(i, section) for i, section in enumerate(sections))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    top = f"<h1>{html.escape(title)}</h1>\n<nav>{links}</nav>"
    text = f"<!DOCTYPE html>\n<html><head>{head}<style>{STYLE}</style></head>\n<body>{top}\n{body}\n</body></html>\n"
    path.write_text(text, encoding="utf-8", errors="replace")


def encoded(image_rgb: NDArray[np.uint8]) -> bytes:
    """An RGB image as JPEG, no wider than a page shows it."""
    if image_rgb.shape[1] > WIDEST_PX:
        height = max(round(image_rgb.shape[0] * WIDEST_PX / image_rgb.shape[1]), 1)
        image_rgb = np.asarray(cv2.resize(image_rgb, (WIDEST_PX, height), interpolation=cv2.INTER_AREA), np.uint8)
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert done
    return data.tobytes()


def _section(index: int, section: Section) -> str:
    parts = [f'<section id="s{index}"><h2>{html.escape(section.title)}</h2>']
    parts += [f"<p>{html.escape(line)}</p>" for line in section.lines]
    parts += [_table(section.table)] if section.table else []
    parts += [_figure(path, caption) for path, caption in section.figures]
    if section.folded:
        inner = "".join(_figure(path, caption) for path, caption in section.folded)
        parts.append(f"<details><summary>attention modules: {len(section.folded)}</summary>{inner}</details>")
    return "".join([*parts, "</section>"])


def _figure(path: Path, caption: str) -> str:
    pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR) if path.is_file() else None
    if pixels is None:
        return ""
    data = base64.b64encode(encoded(np.ascontiguousarray(pixels[:, :, ::-1]))).decode()
    text = html.escape(caption, quote=True)
    return f'<figure><img alt="{text}" src="data:image/jpeg;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"
