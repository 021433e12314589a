"""Where the labels of a split come from: YOLO label files, or a COCO JSON where there are none (or where the dataset file names one)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data.dataset_spec import DatasetSpec
from data.labels.cache import cache_path, cached_labels, content_key
from data.labels.coco import read_coco_labels
from data.labels.files import has_label_files
from data.labels.table import LabelTable
from data.labels.yolo import read_labels
from tasks import DETECT, Task


def split_labels(
    spec: DatasetSpec,
    split: str,
    image_files: Sequence[str],
    *,
    task: Task = DETECT,
    workers: int = 8,
    prefix: str = "",
    progress: bool = True,
) -> tuple[LabelTable, list[str]]:
    """The labels of a split's images, cached, and lines for the user about where they come from.

    Args:
        spec: the data set.
        split: ``train``, ``val`` or ``test``.
        image_files: N images of the split.
        task: reads the rows of label files.
        workers: most parallel readers.
        prefix: words before lines and progress bars.
        progress: whether to show those.
    """
    annotations, remark = labels_json(spec, split, image_files)
    names = None if spec.label_nc != spec.nc else spec.names
    key = content_key(image_files, task=task.name, channels=spec.ch, annotations=annotations, names=names)
    if annotations is None:
        path, read = cache_path(image_files[0], spec.sources(split)[0]), partial(read_labels, image_files, parse_row=task.parse_row)
    else:
        path, read = annotations.with_suffix(".cache.npz"), partial(read_coco_labels, annotations, image_files, names)
    table, cache_remark = cached_labels(path, key, partial(read, channels=spec.ch, workers=workers, prefix=prefix, progress=progress))
    return table, [f"{prefix}{line}" for line in (remark, cache_remark) if line]


def labels_json(spec: DatasetSpec, split: str, image_files: Sequence[str]) -> tuple[Path | None, str]:
    """The COCO JSON that holds a split's labels, None where YOLO label files do; and a line that says which, where there is a choice.

    A JSON that the dataset file names is always taken; one that is only found beside the images is taken if no image has a label file.
    """
    path = spec.annotations_json(split)
    if path is None:
        return None, ""
    if split in spec.annotations:
        return path, f"labels from {path}, which the dataset file names"
    if has_label_files(image_files):
        return None, f"labels from YOLO label files; {path.name} is there too: val.py's ground truth"
    return path, f"labels from {path} (no YOLO label files)"
