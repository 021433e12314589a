"""Files of an explanation: figures as PNG, maps as .npy."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.explain.figures import cam_figure, module_figure
from utils.errors import first_line
from utils.visual.fonts import families_for

if TYPE_CHECKING:
    from engine.explain.explaining import Explanation

log = logging.getLogger(__name__)
DPI = 150
LONGEST_PART = 100  # bytes; file systems allow 255 for a name, which has at most two such parts, numbers and a suffix


def write_explanation(explanation: Explanation, folder: Path, stem: str) -> list[Path]:
    """``<stem>_<method>.png`` with the maps as ``.npy`` of the same name (all rows together, over the image, in 0-1) and one more
    ``_row<N>.npy`` for each row (as the method gives it, before it is scaled), and ``<stem>_row<N>_<module>.png``; returns the figures."""
    figures = []
    for method in explanation.planes:
        name = f"{stem}_{safe_name(method)}"
        np.save(folder / f"{name}.npy", explanation.planes[method])
        for row, cam in explanation.cams[method].items():
            np.save(folder / f"{name}_row{row}.npy", cam.cpu().numpy())
        figures += written(folder / f"{name}.png", lambda method=method: cam_figure(explanation, method))  # type: ignore[misc]
    for name, module in module_names(explanation):
        figures += written(folder / f"{stem}_{name}.png", lambda module=module: module_figure(explanation, module))  # type: ignore[misc]
    return figures


def module_names(explanation: Explanation) -> Iterator[tuple[str, Any]]:
    """A file name for each module, unique among them."""
    for module in explanation.modules:
        inner = module.name.split(".", 2)[2:]
        yield safe_name("_".join((f"row{module.row:02d}", module.kind, *inner)).replace(".", "_")), module


def written(path: Path, make: Callable[[], Any]) -> list[Path]:
    """Makes and writes one figure; the path in a list, or a line and an empty list where it fails."""
    from matplotlib import rc_context

    try:
        with rc_context({"font.family": families_for(())}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # families_for has said so
            make().savefig(str(path), dpi=DPI)
    except Exception as error:  # what fails while drawing is a line and stops nothing
        log.warning("%s: not drawn: %s: %s", path.name, type(error).__name__, first_line(error))
        return []
    return [path]


def safe_name(text: str) -> str:
    """A part of a file name: letters of any script, digits, and few signs; no longer than ``LONGEST_PART``."""
    clean = re.sub(r"[^\w.+-]+", "_", text).encode("utf-8")[:LONGEST_PART]
    return clean.decode("utf-8", "ignore").strip("._") or "image"
