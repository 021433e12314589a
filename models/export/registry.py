"""Export formats by name: ``register_format`` records which ending a format's files have, what writes one and what opens it again.

Nothing here imports torch, and neither do the modules of the built-in formats before they write or open a file: ``--help`` lists the
formats at no cost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from models.export.facts import ExportFacts
from utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.export.source import ExportSource

Run = Callable[["Tensor"], Sequence["Tensor"]]  # images (B, ch, H, W) in 0-1 to the outputs of the file
CHECKPOINTS = (".pt", ".pth", ".safetensors")  # endings that load_model reads


class OpenedFile(NamedTuple):
    """What an opener returns."""

    run: Run
    facts: ExportFacts
    output_shapes: tuple[tuple[int | None, ...], ...] = ()  # as far as the file states them, for files without class names


@dataclass(frozen=True)
class ExportFormat:
    """One kind of exported file.

    Attributes:
        name: as written after ``--include``.
        suffix: ending of its files, such as ``.onnx``. Formats with the same suffix have the same opener.
        write: writes a network to a path.
        open: opens a file on a device. Raises UserError for a file that is damaged or of another kind.
        help: one line for ``export.py --help``.
        stem: added to the name of the weights before the suffix; it distinguishes formats with the same suffix.
        needs: packages to write a file and to compare it with torch.
        open_trusted: the same without checking that the file does nothing but compute, for formats whose files hold code (``--trust``).
        with_nms: name of the format that ``--nms`` makes of this one; empty if it cannot hold suppression.
        expose_candidates: only for a format with suppression inside: a context manager from a file and a confidence threshold to a
            temporary copy of the file that has this threshold, and the candidates of its suppression as further outputs.
    """

    name: str
    suffix: str
    write: Callable[[ExportSource, Path], None]
    open: Callable[[Path, torch.device], OpenedFile]
    help: str
    stem: str = ""
    needs: tuple[str, ...] = ()
    open_trusted: Callable[[Path, torch.device], OpenedFile] | None = None
    with_nms: str = ""
    expose_candidates: Callable[[Path, float], AbstractContextManager[Path]] | None = None

    @property
    def has_suppression(self) -> bool:
        return self.expose_candidates is not None

    def path_beside(self, weights: Path) -> Path:
        """Where the export of ``weights`` is written, such as ``best-end2end.onnx`` beside ``best.pt``."""
        return weights.with_name(f"{weights.stem}{self.stem}{self.suffix}")


FORMATS: dict[str, ExportFormat] = {}  # by name, in the order of registration


def register_format(export_format: ExportFormat) -> ExportFormat:
    """Adds a format to those that ``--include`` accepts and that ``detect.py`` and ``val.py`` open.

    Raises:
        UserError: a name or an ending that is taken or malformed.
    """
    name, suffix = export_format.name, export_format.suffix
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"export format {name!r}: expected lower-case letters, digits and underscores, such as 'my_format'")
    if not re.fullmatch(r"\.[a-z0-9_]+", suffix) or suffix in CHECKPOINTS:
        raise UserError(f"export format {name!r}: suffix {suffix!r}, expected one such as '.onnx' (not {', '.join(CHECKPOINTS)})")
    if name in FORMATS:
        raise UserError(f"export format {name!r} is registered already; choose another name")
    for other in FORMATS.values():
        if other.suffix == suffix and other.open is not export_format.open:
            raise UserError(f"export format {name!r}: {suffix} files are opened by the format {other.name!r}; choose another suffix")
        if (other.suffix, other.stem) == (suffix, export_format.stem):
            raise UserError(f"export format {name!r}: writes the same file name as {other.name!r}; set stem, such as '-{name}'")
    FORMATS[name] = export_format
    return export_format
