"""Figures for a paper's column: matplotlib without its global state, fonts for any script, colours for any colour vision, PNG and PDF."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.visual.fonts import families_for
from utils.visual.names import shown_name

COLUMN, PAGE = 3.5, 7.16  # inches: one column and both of a two-column paper
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")  # Okabe & Ito
MARKERS = "osD^vP"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)))
FONT_POINTS = 8
SETTINGS = {
    "pdf.fonttype": 42,  # journals refuse Type 3 fonts
    "font.size": FONT_POINTS, "axes.titlesize": FONT_POINTS, "axes.labelsize": FONT_POINTS, "legend.fontsize": FONT_POINTS - 1,
    "xtick.labelsize": FONT_POINTS - 1, "ytick.labelsize": FONT_POINTS - 1, "axes.linewidth": 0.6, "grid.linewidth": 0.5,
    "grid.alpha": 0.3, "axes.unicode_minus": True,
}  # fmt: skip
_also: ContextVar[tuple[str, ...]] = ContextVar("formats of figures beside their own", default=())


@dataclass(frozen=True)
class Style:
    """How a line of a number is drawn in every figure: colours come round after seven, with other markers and dashes."""

    colour: str
    marker: str
    dashes: Any

    @classmethod
    def of(cls, number: int) -> Style:
        rounds = number // len(COLOURS)
        return cls(COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)], DASHES[rounds % len(DASHES)])


@contextmanager
def figure_formats(formats: Sequence[str]) -> Iterator[None]:
    """Within it every figure is written in these formats too, beside the file it is asked for."""
    token = _also.set(tuple(formats))
    try:
        yield
    finally:
        _also.reset(token)


@contextmanager
def drawing(path: str | Path, width: float, height: float, *, texts: Iterable[str] = (), dpi: int = 300) -> Iterator[Any]:
    """A figure that is written at the end.

    Args:
        path: File to write; the formats of ``figure_formats`` stand beside it under the same name.
        width: In inches.
        height: In inches.
        texts: What will be written in it that comes from files, to choose fonts that have its characters.
        dpi: Of a PNG or JPEG.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    settings: Any = {**SETTINGS, "font.family": families_for(texts)}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # families_for has said so
            for file in dict.fromkeys([path, *(path.with_suffix(f".{suffix}") for suffix in _also.get())]):
                figure.savefig(str(file), dpi=dpi)


def add_legend(figure: Any, handles: Sequence[Any], names: Sequence[str], *, place: str = "outside lower center", columns: int = 2) -> None:
    """A legend beside the axes, so that it covers nothing; names are set as texts, since a label that begins with ``_`` is left out."""
    if not handles:
        return
    numbers = [str(i) for i in range(len(handles))]
    legend = figure.legend(list(handles), numbers, loc=place, frameon=False, ncols=columns)
    name_legend(legend, names)


def name_legend(legend: Any, names: Sequence[str], *, most: int = 30) -> None:
    """Writes names into a legend."""
    for text, name in zip(legend.get_texts(), names):
        text.set_text(shown_name(name, most=most))
