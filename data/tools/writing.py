"""Data sets written in YOLO's layout: images linked or copied, label files and the dataset file. Nothing is overwritten unasked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from utils.errors import UserError
from utils.files import atomic_write


def label_text(classes: Sequence[int], boxes_cxcywh: np.ndarray, polygons: Sequence[np.ndarray] = ()) -> str:
    """The rows of a label file.

    Args:
        classes: (n,).
        boxes_cxcywh: (n, 4) normalised; written with the fewest digits that float32 is told apart by.
        polygons: (k, 2) normalised points for each object, written in place of its box where there are any.
    """
    rows = []
    for i, (label, box) in enumerate(zip(classes, boxes_cxcywh)):
        values = polygons[i].ravel() if len(polygons) and len(polygons[i]) else box
        rows.append(" ".join((str(int(label)), *(str(v) for v in values.astype(np.float32)))))
    return "".join(f"{row}\n" for row in rows)


def refuse_existing(paths: Iterable[Path], *, exist_ok: bool) -> None:
    """Looks before anything is written.

    Raises:
        UserError: One of the files is there already.
    """
    there = [] if exist_ok else [p for p in paths if os.path.lexists(p)]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(f"{there[0]}{more}: there already; give another --out, or --exist-ok to write over it")


def write_text(path: Path, text: str) -> None:
    """Writes to a new file that then takes the place of what was there; so a linked original is never written into.

    Raises:
        UserError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def place_image(source: str | Path, target: Path) -> None:
    """A hard link to an image, or a copy where links cannot be; nothing where it lies there already.

    Raises:
        UserError: Neither works.
    """
    try:
        if same_file(source, target):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(source), target)
        except OSError:
            shutil.copy2(source, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to one file."""
    return os.path.exists(other) and os.path.samefile(one, other)


def dataset_yaml(splits: Mapping[str, str], names: Sequence[str], *, more: Mapping[str, Any] | None = None) -> str:
    """The text of a dataset file that lies in the data set's own folder."""
    content = {**splits, **(more or {}), "names": dict(enumerate(names))}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
