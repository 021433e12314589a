"""What validation measures against: the COCO file where there is one, which knows area, crowd regions and exact boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import DETECT, Task
from utils import distributed
from utils.metrics.coco_eval import CocoAnnotations, read_instances

if TYPE_CHECKING:
    from data.dataset_spec import DatasetSpec


def split_truth(spec: DatasetSpec, split: str, *, task: Task = DETECT) -> CocoAnnotations | None:
    """The annotations of a split, printed with their problems; None where the ground truth comes from label files.

    A file that lacks what the task compares is passed over, which a line says.
    """
    path = spec.annotations_json(split) if task.coco_type else None
    if path is None:
        return None
    annotations = truth_of_file(path, spec, task=task)
    is_truth = annotations.serves(task.coco_type)
    if distributed.is_main() and is_truth:
        print("\n".join((f"Ground truth: {path}", *(f"{path}: {text}" for text in annotations.remarks))))
    elif distributed.is_main():
        print(f"Ground truth: the label files; {path} has no {_expected(task)}")
    return annotations if is_truth else None


def label_truth(spec: DatasetSpec, split: str, image_files: Sequence[str], *, task: Task = DETECT) -> CocoAnnotations | None:
    """The annotations of a split whose labels come from a COCO file (the loader has printed its problems); None for label files, and for
    a file that lacks what the task compares."""
    from data.labels.source import labels_json

    path, _ = labels_json(spec, split, image_files)
    if path is None:
        return None
    annotations = truth_of_file(path, spec, task=task)
    annotations.check_unique(image_files)
    return annotations if annotations.serves(task.coco_type) else None


def truth_of_file(path: Path, spec: DatasetSpec, *, task: Task = DETECT) -> CocoAnnotations:
    """A COCO file by the classes of the data set."""
    single_class = spec.single_cls and spec.label_nc > 1
    return read_instances(path, spec.names, single_class=single_class, masks=task.coco_type == "segm", keypoints=_keypoints_of(task))


def _keypoints_of(task: Task) -> int | None:
    """How many keypoints an object of the task has; None where it has none, or any number."""
    shape = task.settings.get("kpt_shape")
    return int(shape[0]) if shape else None


def _expected(task: Task) -> str:
    """What a file must hold to be compared with."""
    count = _keypoints_of(task)
    return {"segm": "segmentation", "keypoints": f"object with {count} keypoints, as kpt_shape says" if count else "keypoints"}.get(
        task.coco_type or "", "boxes"
    )
