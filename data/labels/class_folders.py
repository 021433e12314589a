"""Labels of images with one class each: a folder for each class. What a folder holds, at any depth, is of its class."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data.dataset_spec import DatasetSpec, class_folder_names
from data.labels.cache import cached_labels, content_key
from data.labels.files import has_label_files
from data.labels.probing import map_images, probe_labels
from data.labels.problems import NO_LABELS, Problem
from data.labels.table import LabelTable, build_table
from utils.errors import UserError, nearest

NO_CLASS = -1
WHOLE = (0.5, 0.5, 1.0, 1.0)


def folder_labels(
    spec: DatasetSpec, split: str, image_files: Sequence[str], *, workers: int = 8, prefix: str = "", progress: bool = True
) -> tuple[LabelTable, list[str]]:
    """The class of each image of a split by its folder, and lines about folders that are empty, missing or unknown.

    Images are opened once and their sizes cached beside the split's folder. One that lies in no class folder, or in one that ``names`` does
    not have, is left out.

    Args:
        spec: the data set.
        split: ``train``, ``val`` or ``test``.
        image_files: N images of the split.
        workers: most parallel readers.
        prefix: words before lines and progress bars.
        progress: whether to show those.

    Raises:
        UserError: no image lies in a folder of a class.
    """
    sources = spec.sources(split)
    folders = [class_folder(file, sources) for file in image_files]
    numbers, remarks = _numbers(spec, split, folders)
    labels = np.array([numbers.get(name, NO_CLASS) if name else NO_CLASS for name in folders], np.int64)
    if not (labels >= 0).any():
        raise UserError(f"{spec.yaml_path}: none of the {len(labels)} images of {split!r} lies in a folder of a class: {_expected(spec)}")
    path = sources[0].parent / f"{sources[0].stem if sources[0].is_file() else sources[0].name}.cache.npz"
    probe = partial(probe_labels, channels=spec.ch)
    key = content_key(image_files, task="class folders", channels=spec.ch, label_files=False)
    table, cache_remark = cached_labels(
        path, key, lambda: build_table(map_images(probe, image_files, workers=workers, title=f"{prefix}images", progress=progress))
    )
    table = _with_classes(table, labels)
    astray = [Problem(f, 0, "lies in no class folder", True, NO_LABELS) for f, name in zip(image_files, folders) if not name]
    table = table.mark_unusable(labels < 0, astray)
    lines = [cache_remark, *remarks, *_folder_remarks(spec, split, set(folders))]
    return table, [f"{prefix}{line}" for line in lines if line]


def has_class_folders(spec: DatasetSpec, image_files: Sequence[str]) -> bool:
    """Whether a data set is one of class folders: a folder itself, or folders of its class names hold images without label files."""
    if spec.yaml_path.is_dir():
        return True
    named = set(class_folder_names((*spec.train, *spec.val))) & set(spec.class_names)
    return bool(named) and not has_label_files(image_files)


def class_folder(image_file: str, sources: Sequence[Path]) -> str:
    """The name of the folder that says an image's class: the first below its source, or of a listed image the one that it is in."""
    for source in sources:
        if source.is_dir() and image_file.startswith(f"{source}{os.sep}"):
            inner = os.path.relpath(image_file, source).split(os.sep)
            return inner[0] if len(inner) > 1 else ""
    return Path(image_file).parent.name


def _numbers(spec: DatasetSpec, split: str, folders: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Class number by folder name: by the class names, or where no folder has one of these, in the order of the training folders."""
    by_name = {name: number for number, name in enumerate(spec.class_names or spec.names)}
    found = Counter(filter(None, folders))
    if found and not by_name.keys() & found.keys():
        train = class_folder_names(spec.train)
        if len(train) == len(by_name):
            names = spec.class_names or spec.names
            pairs = f"{train[0]} is {names[0]}, {train[-1]} is {names[-1]}"
            return {name: number for number, name in enumerate(train)}, [f"{split}: folders have none of the names; in order, {pairs}"]
    unknown = {name: count for name, count in found.items() if name not in by_name}
    return by_name, [_unknown(spec, split, name, count, by_name) for name, count in unknown.items()]


def _unknown(spec: DatasetSpec, split: str, name: str, count: int, known: dict[str, int]) -> str:
    hint = nearest(name, known)
    where = "train has no such folder" if spec.yaml_path.is_dir() else f"it is none of the {len(known)} names of {spec.yaml_path}"
    return f"warning: class folder {name!r} of {split!r}: {where}, {count} images left out{'; ' + hint if hint else ''}"


def _folder_remarks(spec: DatasetSpec, split: str, used: set[str]) -> list[str]:
    """Lines about class folders without an image, and classes without a folder."""
    folders = class_folder_names(spec.sources(split))
    empty = [name for name in folders if name not in used]
    names = spec.class_names or spec.names
    missing = [name for name in names if name not in folders] if set(folders) & set(names) else []
    lines = [f"warning: class folder {name!r} of {split!r} has no image" for name in empty]
    return lines + [f"warning: {split!r} has no folder of class {name!r}" for name in missing]


def _with_classes(table: LabelTable, labels: np.ndarray) -> LabelTable:
    """The table (N images without objects) with one object an image that has a class and can be used: the whole image."""
    counts = (labels >= 0) & table.usable
    n = int(counts.sum())
    return dataclasses.replace(
        table,
        has_label_file=labels >= 0,
        starts=np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64))),
        classes=labels[counts],
        boxes_cxcywh=np.tile(np.array(WHOLE, np.float32), (n, 1)),
        rows=np.zeros(n, np.int64),
        point_starts=np.zeros(n + 1, np.int64),
        points=np.zeros((0, 2), np.float32),
    )


def _expected(spec: DatasetSpec) -> str:
    """What a set of images with classes looks like."""
    return f"a folder for each class is expected, such as train/{spec.names[0]}/1.jpg; this model's classes are of whole images"
