"""Labels read once and stored: an .npz beside the label folder (or the COCO JSON), valid while no image and no label has changed.

The key is a hash of every path, size and modification time together with the format's version. The file holds arrays of numbers and one
JSON text, no pickle, so it can run no code. A stale, foreign or truncated file is ignored, and the labels are read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from data.images.reading import CONVERTED
from data.labels.files import find_label_files, label_path
from data.labels.problems import Problem
from data.labels.table import LabelTable
from utils.files import atomic_write

FORMAT_VERSION = 5
ARRAYS = ("shapes_hw", "has_label_file", "starts", "classes", "boxes_cxcywh", "rows", "point_starts", "points")
OPTIONAL_ARRAYS = ("keypoints", "breaks")


def cached_labels(path: Path, key: str, read: Callable[[], LabelTable]) -> tuple[LabelTable, str]:
    """The labels that a file holds under a key; else they are read and stored there.

    Args:
        path: the cache file.
        key: from ``content_key``.
        read: reads the labels.

    Returns:
        The table, and a message where it could not be stored (else empty).
    """
    table = load(path, key)
    if table is not None:
        return table, ""
    table = read()
    try:
        save(path, key, table)
    except OSError as error:
        return table, f"labels are not cached: {path.parent} cannot be written ({error.strerror or error})"
    return table, ""


def cache_path(image_file: str, source: Path) -> Path:
    """Beside the folder of the first label file, with the source's name: ``labels/train.cache.npz`` for ``images/train``."""
    folder = Path(label_path(image_file)).parent
    if not folder.parent.is_dir():
        folder = Path(image_file).parent  # labels lie beside the images, or nowhere
    name = source.stem if source.suffix == ".txt" or source.name != "images" else folder.name
    return folder.parent / f"{name}.cache.npz"


def content_key(
    image_files: Sequence[str],
    *,
    task: str = "detect",
    channels: int = 3,
    annotations: Path | None = None,
    names: Sequence[str] | None = None,
    kpt_shape: tuple[int, int] | None = None,
) -> str:
    """Hash over path, size and modification time of every image and label file, and over what else decides how they are read.

    One and three channels are converted from the same images, so they share a key.

    Args:
        image_files: N images.
        task: name of the task whose columns the label files have.
        channels: that the images should have.
        annotations: a COCO JSON in place of label files.
        names: of the classes, which choose the JSON's categories.
        kpt_shape: of pose labels.
    """
    head = f"labels {FORMAT_VERSION} {task}{'' if channels in CONVERTED else f' upright channels {channels}'}\n"
    if kpt_shape:
        head += f"keypoints {kpt_shape}\n"
    if annotations:
        head += f"{_file_state(str(annotations))}{json.dumps(names)}\n"
    digest = hashlib.sha256(head.encode(errors="surrogateescape"))
    label_files = [] if annotations else find_label_files(image_files)
    for image, label_file in zip_longest(image_files, label_files):
        entry = _file_state(image) + (_file_state(label_file) if label_file else "")
        digest.update(entry.encode(errors="surrogateescape"))
    return digest.hexdigest()


def load(path: Path, key: str) -> LabelTable | None:
    """The stored table if the file is there, complete, and has this key; else None."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            problems = tuple(Problem(*p) for p in json.loads(stored["problems"].tobytes().decode()))
            arrays = {name: stored[name] for name in (*ARRAYS, *(n for n in OPTIONAL_ARRAYS if n in stored))}
            return LabelTable(**arrays, problems=problems)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile):
        return None


def save(path: Path, key: str, table: LabelTable) -> None:
    """Writes the cache file under a temporary name and renames it. Arrays that the table lacks are left out.

    Raises:
        OSError: the folder cannot be written.
    """
    arrays = {name: getattr(table, name) for name in (*ARRAYS, *OPTIONAL_ARRAYS)}
    problems = np.frombuffer(json.dumps(table.problems).encode(), np.uint8)
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(file, key=np.array(key), problems=problems, **{name: a for name, a in arrays.items() if a is not None})


def _file_state(path: str) -> str:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # the latter for a null character in a name
        return f"{path}\0missing\n"
    return f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
