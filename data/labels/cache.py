"""Labels read once and kept: an .npz beside the label folder (or the COCO JSON), valid as long as no image and no label has changed.

The key is a hash of every path, size and modification time together with the format's version; there is nothing in the file but arrays
of numbers and one JSON text, so it can run no code. A stale, foreign or torn file is read anew, never trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.images.reading import CONVERTED
from data.labels.coco import read_coco_labels
from data.labels.problems import Problem
from data.labels.yolo import LabelTable, label_path, read_labels
from utils.files import atomic_write

FORMAT_VERSION = 2
ARRAYS = ("shapes_hw", "has_label_file", "starts", "classes", "boxes_cxcywh", "rows", "point_starts", "points")


def cached_labels(
    image_files: Sequence[str], *, source: Path, channels: int = 3, workers: int = 8, prefix: str = "", progress: bool = True,
    annotations: Path | None = None, names: Sequence[str] | None = None,
) -> tuple[LabelTable, str]:  # fmt: skip
    """The labels of all images, from the cache if it is valid, else read and then cached.

    Args:
        image_files: N images.
        source: The folder or list they come from; names the cache file.
        channels: That the images should have.
        workers: Most parallel readers.
        prefix: Words before the progress bar.
        progress: Whether to show it.
        annotations: A COCO JSON to take the labels from, in place of label files.
        names: Of the classes, for that; None makes all objects class 0.

    Returns:
        The table, and one line about the cache for the user (empty: nothing to say).
    """
    path = annotations.with_suffix(".cache.npz") if annotations else cache_path(image_files[0], source)
    key = content_key(image_files, channels=channels, annotations=annotations, names=names)
    table = load(path, key)
    if table is not None:
        return table, ""
    if annotations:
        table = read_coco_labels(
            annotations, image_files, names, channels=channels, workers=workers, prefix=prefix, progress=progress
        )  # fmt: skip
    else:
        table = read_labels(image_files, channels=channels, workers=workers, prefix=prefix, progress=progress)
    try:
        save(path, key, table)
    except OSError as error:
        return table, f"{prefix}labels are not cached: {path.parent} cannot be written ({error.strerror or error})"
    return table, ""


def cache_path(image_file: str, source: Path) -> Path:
    """Beside the folder of the first label file, with the source's name: ``labels/train.cache.npz`` for ``images/train``."""
    folder = Path(label_path(image_file)).parent
    name = source.stem if source.suffix == ".txt" or source.name != "images" else folder.name
    return folder.parent / f"{name}.cache.npz"


def content_key(
    image_files: Sequence[str], *, channels: int = 3, annotations: Path | None = None, names: Sequence[str] | None = None
) -> str:
    """Hash over path, size and modification time of every image and label file (or of the JSON in their place, with the names that
    choose its classes), the channels the images should have, and the format's version.

    One and three channels are had from the same images, so they share a key.
    """
    head = f"labels {FORMAT_VERSION}{'' if channels in CONVERTED else f' upright channels {channels}'}\n"
    if annotations:
        head += f"{_state(str(annotations))}{json.dumps(names)}\n"
    digest = hashlib.sha256(head.encode(errors="surrogateescape"))
    for image in image_files:
        entry = _state(image) if annotations else _state(image) + _state(label_path(image))
        digest.update(entry.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _state(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return f"{path}\0missing\n"
    return f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"


def load(path: Path, key: str) -> LabelTable | None:
    """The stored table if the file is there, whole, and has this key; else None."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            problems = tuple(Problem(*p) for p in json.loads(stored["problems"].tobytes().decode()))
            return LabelTable(**{name: stored[name] for name in ARRAYS}, problems=problems)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile):
        return None


def save(path: Path, key: str, table: LabelTable) -> None:
    """A reader never sees half a cache.

    Raises:
        OSError: The folder cannot be written.
    """
    with atomic_write(path) as partial, open(partial, "wb") as file:
        problems = np.frombuffer(json.dumps(table.problems).encode(), np.uint8)
        np.savez(file, key=np.array(key), problems=problems, **{name: getattr(table, name) for name in ARRAYS})
