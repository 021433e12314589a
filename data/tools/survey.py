"""A close look at a data set: every image decoded, every label row read, contents compared by hash within and between splits."""

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
from data.labels.files import label_path, list_images
from data.labels.probing import map_images
from data.labels.problems import CORRUPT, DUPLICATE_IMAGE, LEAK, ORPHAN, Problem
from data.labels.source import labels_json, split_labels
from data.labels.table import LabelTable

SMALL_PX2, LARGE_PX2 = 32.0**2, 96.0**2  # COCO's bounds of area
SIZES = ("small", "medium", "large")
NOT_LABELS = {"classes.txt", "obj.names", "notes.txt"}  # which labelling programs leave among label files


@dataclasses.dataclass(frozen=True)
class SplitSurvey:
    """What was found in one split.

    Attributes:
        split: Its name.
        files: N images.
        table: Their labels; those of images that cannot be used are gone.
        hashes: (N,) of the images' contents, empty where they cannot be read.
        repeats: (N,) bool, whether the content occurred before in this split.
        leaks: (N,) bool, whether the content is in a split that is held out for this one too.
        problems: Everything wrong, each once.
    """

    split: str
    files: tuple[str, ...]
    table: LabelTable
    hashes: tuple[str, ...]
    repeats: np.ndarray
    leaks: np.ndarray
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> np.ndarray:
        """(N,) bool."""
        return self.table.shapes_hw[:, 0] > 0

    def box_areas(self) -> np.ndarray:
        """(M,) px² in the original images."""
        return np.prod(self.box_sizes(), axis=1)

    def box_sizes(self) -> np.ndarray:
        """(M, 2) width and height in px of the original images."""
        wh = np.repeat(self.table.shapes_hw[:, ::-1], np.diff(self.table.starts), axis=0)
        return self.table.boxes_cxcywh[:, 2:].astype(np.float64) * wh


def survey(spec: DatasetSpec, *, workers: int = 8, progress: bool = True) -> list[SplitSurvey]:
    """Looks at all splits that are there.

    Raises:
        UserError: A split without images, or an annotation file that cannot be read.
    """
    present = [s for s in SPLITS if getattr(spec, s) and all(p.exists() for p in getattr(spec, s))]
    files = {s: list_images(spec.sources(s)) for s in present}
    looked = [_look(spec, s, files[s], workers, progress) for s in present]
    all_files = [f for split in files.values() for f in split]
    text_labels = [f for s in present if labels_json(spec, s, files[s])[0] is None for f in files[s]]
    strays = orphans(text_labels, known=all_files)
    homes: dict[str, list[tuple[str, str]]] = {}  # hash: split and file
    for split in looked:
        for digest, file in zip(split.hashes, split.files):
            homes.setdefault(digest, []).append((split.split, file))
    homes.pop("", None)
    found = [_compared(split, homes) for split in looked]
    if found and strays:
        found[0] = dataclasses.replace(found[0], problems=(*found[0].problems, *strays))
    return found


def orphans(image_files: Sequence[str], *, known: Sequence[str]) -> list[Problem]:
    """Label files beside those of the images that belong to no image; only in folders of labels alone."""
    expected = {label_path(f) for f in known}
    folders = dict.fromkeys(os.path.dirname(label_path(f)) for f in image_files if os.path.dirname(label_path(f)) != os.path.dirname(f))
    found = []
    for folder in folders:
        if os.path.isdir(folder):
            with os.scandir(folder) as entries:
                texts = sorted(e.path for e in entries if e.name.endswith(".txt") and e.name not in NOT_LABELS)
            found += [Problem(p, 0, "no image of this name", False, ORPHAN) for p in texts if p not in expected]
    return found


class Look(NamedTuple):
    """An image's content."""

    digest: str  # empty: cannot be read
    fault: str  # empty: can be decoded


def look_at(image_file: str, *, channels: int) -> Look:
    """Hashes and decodes an image."""
    try:
        digest = hashlib.blake2b(Path(image_file).read_bytes(), digest_size=16).hexdigest() if os.path.isfile(image_file) else ""
        read_image(image_file, channels=channels, dtype=None)
    except ImageError as error:
        return Look(digest, str(error).removeprefix(f"{image_file}: "))
    except OSError as error:
        return Look("", str(error.strerror))
    return Look(digest, "")


def size_counts(areas_px2: np.ndarray) -> dict[str, int]:
    """Boxes by COCO's classes of area."""
    small, large = int((areas_px2 < SMALL_PX2).sum()), int((areas_px2 > LARGE_PX2).sum())
    return dict(zip(SIZES, (small, len(areas_px2) - small - large, large)))


def _look(spec: DatasetSpec, split: str, files: list[str], workers: int, progress: bool) -> SplitSurvey:
    """Labels and contents of one split."""
    table, _ = split_labels(spec, split, files, workers=workers, progress=progress)
    names = spec.names if spec.label_nc == spec.nc else [""] * spec.label_nc
    table = table.mark_unusable(*find_nameless_objects(table, files, names, spec.yaml_path))
    regular = [f if os.path.isfile(f) else "" for f in files]  # a pipe would be waited for
    looks = map_images(partial(_look_at_file, channels=spec.ch), regular, workers=workers, title=f"{split}: decoding", progress=progress)
    broken = np.array([bool(look.fault) and hw[0] > 0 for look, hw in zip(looks, table.shapes_hw)], bool)
    faults = [Problem(files[i], 0, looks[i].fault, True, CORRUPT) for i in np.flatnonzero(broken)]
    table = table.mark_unusable(broken, faults) if faults else table
    nothing = np.zeros(len(files), bool)
    return SplitSurvey(split, tuple(files), table, tuple(look.digest for look in looks), nothing, nothing, table.problems)


def _look_at_file(image_file: str, *, channels: int) -> Look:
    return look_at(image_file, channels=channels) if image_file else Look("", "not a file")


def _compared(split: SplitSurvey, homes: dict[str, list[tuple[str, str]]]) -> SplitSurvey:
    """With the images that occur before, or in a later split (train before val before test): leakage is charged to the earlier one."""
    later = SPLITS[SPLITS.index(split.split) + 1 :]
    repeats, leaks, problems = np.zeros(len(split.files), bool), np.zeros(len(split.files), bool), list(split.problems)
    for i, (digest, file) in enumerate(zip(split.hashes, split.files)):
        twins = homes.get(digest, [])
        own = [f for s, f in twins if s == split.split]
        other = next(((s, f) for s, f in twins if s in later), None)
        if own and own[0] != file:
            repeats[i] = True
            problems.append(Problem(file, 0, f"the same content as {own[0]}", False, DUPLICATE_IMAGE))
        if other:
            leaks[i] = True
            problems.append(Problem(file, 0, f"in {split.split}, and in {other[0]} as {other[1]}", False, LEAK))
    return dataclasses.replace(split, repeats=repeats, leaks=leaks, problems=tuple(problems))
