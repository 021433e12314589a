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

    A file that lacks what the task compares (keypoints) is passed over.
    """
    path = spec.annotations_json(split) if task.coco_type else None
    if path is None:
        return None
    annotations = truth_of_file(path, spec)
    if not annotations.serves(task.coco_type):
        return None
    if distributed.is_main():
        print("\n".join((f"Ground truth: {path}", *(f"{path}: {text}" for text in annotations.remarks))))
    return annotations


def label_truth(spec: DatasetSpec, split: str, image_files: Sequence[str]) -> CocoAnnotations | None:
    """The annotations of a split whose labels come from a COCO file (the loader has printed its problems); None for label files."""
    from data.labels.source import labels_json

    path, _ = labels_json(spec, split, image_files)
    if path is None:
        return None
    annotations = truth_of_file(path, spec)
    annotations.check_unique(image_files)
    return annotations


def truth_of_file(path: Path, spec: DatasetSpec) -> CocoAnnotations:
    """A COCO file by the classes of the data set."""
    return read_instances(path, spec.names, single_class=spec.single_cls and spec.label_nc > 1)
