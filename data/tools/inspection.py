"""The inspection of a data set: every image decoded, every label row read, contents compared by hash within and between splits."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.dataset_spec import SPLITS, DatasetSpec
from data.images.reading import ImageError, read_image
from data.labels.checks import find_nameless_objects
from data.labels.class_folders import has_class_folders
from data.labels.files import label_path, list_images
from data.labels.probing import map_images
from data.labels.problems import CORRUPT, DUPLICATE_IMAGE, LEAK, NO_LABELS, ORPHAN, Problem
from data.labels.source import labels_json, split_labels
from data.labels.table import LabelTable
from tasks import CLASSIFY, DETECT, POSE, Task

SMALL_PX2, LARGE_PX2 = 32.0**2, 96.0**2  # COCO's bounds of area
SIZES = ("small", "medium", "large")
NOT_LABELS = {"classes.txt", "obj.names", "notes.txt"}  # which labelling programs leave among label files


@dataclasses.dataclass(frozen=True)
class SplitInspection:
    """What was found in one split.

    Attributes:
        split: its name.
        files: N images.
        table: their labels; unusable images have none.
        hashes: (N,) of the images' contents, empty where they cannot be read.
        repeats: (N,) bool, whether the content occurred before in this split.
        leaks: (N,) bool, whether the content is also in a later split (train before val before test).
        problems: everything wrong, each once.
        remarks: lines about where the labels come from.
    """

    split: str
    files: tuple[str, ...]
    table: LabelTable
    hashes: tuple[str, ...]
    repeats: np.ndarray
    leaks: np.ndarray
    problems: tuple[Problem, ...]
    remarks: tuple[str, ...] = ()

    @property
    def usable(self) -> np.ndarray:
        """(N,) bool."""
        return self.table.usable

    def box_areas(self) -> np.ndarray:
        """(M,) px² in the original images."""
        return self.table.box_sizes_px().prod(1)


def inspect_dataset(spec: DatasetSpec, *, task: Task | None = None, workers: int = 8, progress: bool = True) -> list[SplitInspection]:
    """Inspects all splits whose sources exist.

    Args:
        spec: the data set.
        task: by whose rules rows are judged; that of ``task_of`` if None.
        workers: most parallel readers.
        progress: whether to show bars.

    Raises:
        UserError: a split without images, an annotation file that cannot be read, or labels that cannot be of this task.
    """
    present = [s for s in SPLITS if getattr(spec, s) and all(p.exists() for p in getattr(spec, s))]
    files = {s: list_images(spec.sources(s)) for s in present}
    task = (task or task_of(spec, next(iter(files.values()), []))).for_labels(spec.label_settings, source=str(spec.yaml_path))
    inspected = [_inspect_split(spec, s, files[s], task, workers=workers, progress=progress) for s in present]
    all_files = [f for split in files.values() for f in split]
    text_labels = [f for s in present if labels_json(spec, s, files[s])[0] is None for f in files[s]]
    orphans = find_orphans(text_labels, known=all_files)
    by_hash: dict[str, list[tuple[str, str]]] = {}  # split and file
    for split in inspected:
        for digest, file in zip(split.hashes, split.files):
            by_hash.setdefault(digest, []).append((split.split, file))
    by_hash.pop("", None)
    found = [_compare_contents(split, by_hash) for split in inspected]
    if found and orphans:
        found[0] = dataclasses.replace(found[0], problems=(*found[0].problems, *orphans))
    return found


def task_of(spec: DatasetSpec, image_files: Sequence[str]) -> Task:
    """The task that a data set is for, as far as it tells: class folders, keypoints, else detection."""
    return CLASSIFY if has_class_folders(spec, image_files) else POSE if spec.kpt_shape else DETECT


def find_orphans(image_files: Sequence[str], *, known: Sequence[str]) -> list[Problem]:
    """Label files beside those of the images that belong to no image; only in folders that hold nothing but labels."""
    expected = {label_path(f) for f in known}
    folders = dict.fromkeys(os.path.dirname(label_path(f)) for f in image_files if os.path.dirname(label_path(f)) != os.path.dirname(f))
    found = []
    for folder in folders:
        if os.path.isdir(folder):
            with os.scandir(folder) as entries:
                texts = sorted(e.path for e in entries if e.name.endswith(".txt") and e.name not in NOT_LABELS)
            found += [Problem(p, 0, "no image of this name", False, ORPHAN) for p in texts if p not in expected]
    return found


class ImageContent(NamedTuple):
    """The hash of an image file, and whether it can be decoded."""

    digest: str  # empty: cannot be read
    error: str  # empty: can be decoded


def hash_image(image_file: str, *, channels: int) -> ImageContent:
    """Hashes and decodes an image; ``image_file`` is empty where it is no regular file (a pipe would block)."""
    if not image_file:
        return ImageContent("", "not a file")
    try:
        digest = hashlib.blake2b(Path(image_file).read_bytes(), digest_size=16).hexdigest() if os.path.isfile(image_file) else ""
        read_image(image_file, channels=channels, dtype=None)
    except ImageError as error:
        return ImageContent(digest, str(error).removeprefix(f"{image_file}: "))
    except OSError as error:
        return ImageContent("", str(error.strerror))
    return ImageContent(digest, "")


def size_counts(areas_px2: np.ndarray) -> dict[str, int]:
    """Boxes by COCO's classes of area."""
    small, large = int((areas_px2 < SMALL_PX2).sum()), int((areas_px2 > LARGE_PX2).sum())
    return dict(zip(SIZES, (small, len(areas_px2) - small - large, large)))


def _inspect_split(spec: DatasetSpec, split: str, files: list[str], task: Task, *, workers: int, progress: bool) -> SplitInspection:
    """Labels and contents of one split."""
    table, remarks = split_labels(spec, split, files, task=task, workers=workers, prefix=f"{split}: ", progress=progress)
    names = spec.names if spec.label_nc == spec.nc else [""] * spec.label_nc
    table = table.mark_unusable(*find_nameless_objects(table, files, names, spec.yaml_path))
    regular = [f if os.path.isfile(f) else "" for f in files]
    contents = map_images(
        partial(hash_image, channels=spec.ch), regular, workers=workers, title=f"{split}: decoding", progress=progress
    )  # fmt: skip
    broken = np.array([bool(c.error) and bool(ok) for c, ok in zip(contents, table.usable)], bool)
    problems = [Problem(files[i], 0, contents[i].error, True, CORRUPT) for i in np.flatnonzero(broken)]
    table = table.mark_unusable(broken, problems) if problems else table
    none = np.zeros(len(files), bool)
    found = (*table.problems, *_find_no_labels(split, files, table))
    return SplitInspection(split, tuple(files), table, tuple(c.digest for c in contents), none, none, found, tuple(remarks))


def _find_no_labels(split: str, files: Sequence[str], table: LabelTable) -> list[Problem]:
    """A problem where a split to train or validate on has no label at all, which training refuses."""
    if split not in ("train", "val") or len(table.classes) or table.has_label_file.any():
        return []
    message = f"no label file for any of the {len(files)} images of {split!r}, the first is expected here"
    return [Problem(label_path(files[0]), 0, message, False, NO_LABELS)]


def _compare_contents(split: SplitInspection, by_hash: dict[str, list[tuple[str, str]]]) -> SplitInspection:
    """Marks the images that occur before in the split, or also in a later split (train before val before test): these leak."""
    later = SPLITS[SPLITS.index(split.split) + 1 :]
    repeats, leaks, problems = np.zeros(len(split.files), bool), np.zeros(len(split.files), bool), list(split.problems)
    for i, (digest, file) in enumerate(zip(split.hashes, split.files)):
        same = by_hash.get(digest, [])
        own = [f for s, f in same if s == split.split]
        other = next(((s, f) for s, f in same if s in later), None)
        if own and own[0] != file:
            repeats[i] = True
            problems.append(Problem(file, 0, f"the same content as {own[0]}", False, DUPLICATE_IMAGE))
        if other:
            leaks[i] = True
            problems.append(Problem(file, 0, f"in {split.split}, and in {other[0]} as {other[1]}", False, LEAK))
    return dataclasses.replace(split, repeats=repeats, leaks=leaks, problems=tuple(problems))
