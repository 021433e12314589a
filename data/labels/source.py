"""Where the labels of a split come from: YOLO label files, or a COCO JSON where there are none (or where the dataset file names one)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data.dataset_spec import DatasetSpec
from data.labels.cache import cache_path, cached_labels, content_key
from data.labels.class_folders import folder_labels
from data.labels.coco import read_coco_labels
from data.labels.files import find_label_files, has_label_files, label_path
from data.labels.outlines import outline_remark
from data.labels.pose import KEYPOINTS_TASK, lacks_keypoints, pose_remark, row_parser, unnamed_pose_remark, wrong_pose_remark
from data.labels.table import LabelTable
from data.labels.yolo import read_labels
from tasks import DETECT, Task
from utils.errors import UserError


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
    if task.whole_image:
        return folder_labels(spec, split, image_files, workers=workers, prefix=prefix, progress=progress)
    if spec.yaml_path.is_dir():
        raise UserError(f"{spec.yaml_path}: a folder for each class, without places of objects; the model's task is {task.name}")
    annotations, remark = labels_json(spec, split, image_files)
    points = spec.keypoints if spec.keypoints and task.coco_type == KEYPOINTS_TASK else None
    names = None if spec.label_nc != spec.nc else spec.names
    key = content_key(image_files, task=task.name, channels=spec.ch, annotations=annotations, names=names, kpt_shape=spec.kpt_shape)
    if annotations is None:
        parse_row = row_parser(task, spec.kpt_shape) or task.parse_row
        path, read = cache_path(image_files[0], spec.sources(split)[0]), partial(read_labels, image_files, parse_row=parse_row)
    else:
        path = annotations.with_suffix(".cache.npz")
        read = partial(read_coco_labels, annotations, image_files, names, keypoints=points.count if points else None)
    table, cache_remark = cached_labels(path, key, partial(read, channels=spec.ch, workers=workers, prefix=prefix, progress=progress))
    remarks = [remark, cache_remark, "" if annotations else beside_remark(image_files), pose_remark(task, spec.kpt_shape)]
    if points is not None and lacks_keypoints(table):
        source = annotations or spec.yaml_path
        raise UserError(f"{source}: no object of {split!r} has a labelled keypoint; kpt_shape {list(points.shape)} says they have")
    remarks.append(outline_remark(task, table, source=str(annotations or f"{spec.yaml_path}: {split}")))
    if annotations is None and table.keypoints is None:
        remarks.append(wrong_pose_remark(table) if spec.kpt_shape else unnamed_pose_remark(table))
    return table, [f"{prefix}{line}" for line in remarks if line]


def beside_remark(image_files: Sequence[str]) -> str:
    """A line that says how many label files lie beside their images where the rule names another folder; empty where none does."""
    beside = [(rule, found) for rule, found in zip(map(label_path, image_files), find_label_files(image_files)) if rule != found]
    if not beside:
        return ""
    rule, found = beside[0]
    return f"{len(beside)} of {len(image_files)} images have their labels beside them, first: {found} (there is no {rule})"


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
