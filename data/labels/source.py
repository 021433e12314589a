"""Where the labels of a split come from: YOLO label files, or a COCO JSON where there are none (or where the dataset file names one)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from data.dataset_spec import DatasetSpec
from data.labels.cache import cached_labels
from data.labels.yolo import LabelTable, label_path


def split_labels(
    spec: DatasetSpec, split: str, image_files: Sequence[str], *, workers: int = 8, prefix: str = "", progress: bool = True
) -> tuple[LabelTable, list[str]]:
    """The labels of a split's images, cached, and lines for the user about where they come from.

    Args:
        spec: The data set.
        split: ``train``, ``val`` or ``test``.
        image_files: N images of the split.
        workers: Most parallel readers.
        prefix: Words before lines and progress bars.
        progress: Whether to show those.
    """
    annotations, remark = labels_json(spec, split, image_files)
    table, cache_remark = cached_labels(
        image_files, source=spec.sources(split)[0], channels=spec.ch, workers=workers, prefix=prefix, progress=progress,
        annotations=annotations, names=None if spec.label_nc != spec.nc else spec.names,
    )  # fmt: skip
    return table, [f"{prefix}{remark}"] * bool(remark) + [cache_remark] * bool(cache_remark)


def labels_json(spec: DatasetSpec, split: str, image_files: Sequence[str]) -> tuple[Path | None, str]:
    """The COCO JSON that holds a split's labels, None where YOLO label files do; and a line that says which, where there is a choice.

    A JSON that the dataset file names is taken; one that is only found beside the images is, if not one image has a label file.
    """
    path = spec.annotations_json(split)
    if path is None:
        return None, ""
    if split in spec.annotations:
        return path, f"labels from {path}, which the dataset file names"
    if has_label_files(image_files):
        return None, f"labels from YOLO label files; {path.name} is there too: val.py's ground truth"
    return path, f"labels from {path} (no YOLO label files)"


def has_label_files(image_files: Sequence[str]) -> bool:
    """Whether any of the images has one; folders are listed rather than asked for every file."""
    expected: set[str] = set()
    for folder in dict.fromkeys(os.path.dirname(label_path(f)) for f in image_files):
        try:
            with os.scandir(folder) as entries:
                texts = [e.path for e in entries if e.name.endswith(".txt")]
        except OSError:
            continue
        expected = expected or {label_path(f) for f in image_files} if texts else expected
        if not expected.isdisjoint(texts):
            return True
    return False
