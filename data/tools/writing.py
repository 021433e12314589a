"""Data sets written in YOLO's layout: images linked or copied, label files and the dataset file; no file is overwritten unless asked."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml

from data.labels.files import label_path
from data.labels.problems import Problem
from data.labels.table import ImageLabels, build_table
from utils.errors import UserError
from utils.files import atomic_write
from utils.masks.outlines import joined


@dataclasses.dataclass(frozen=True)
class Converted:
    """An image to be written.

    Attributes:
        name: ``split/name`` of the image, with its suffix.
        labels: its objects.
        origin: what it was converted from, for messages.
        source: the image, None where only its labels are written.
    """

    name: str
    labels: ImageLabels
    origin: str
    source: Path | None = None


def write_yolo_dataset(
    out: Path, images: Sequence[Converted], names: Sequence[str], *, segments: bool = False, exist_ok: bool = False,
    more: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """Writes label files, images and ``data.yaml``.

    Args:
        out: folder.
        images: what to write.
        names: of the classes.
        segments: write polygons where there are any, and then no keypoints.
        exist_ok: write over files that exist.
        more: further keys of ``data.yaml``.

    Returns:
        How much was written, in words.

    Raises:
        UserError: a file would be written twice, exists already, lies outside ``out``, or cannot be written.
    """
    outside = next((i.name for i in images if ".." in Path(i.name).parts or Path(i.name).is_absolute()), None)
    if outside is not None:
        raise UserError(f"file name {outside!r} leads out of the data set; relative names without '..' are expected")
    paths = [Path(label_path(str(out / "images" / i.name))) for i in images]
    _refuse_two_writers(paths, images)
    texts = {path: _label_text_of(image.labels, segments) for path, image in zip(paths, images)}
    splits = list(dict.fromkeys(i.name.split("/")[0] for i in images))
    keys = {"train": next((s for s in splits if "val" not in s and "test" not in s), None)}
    keys |= {key: next((s for s in splits if key in s), None) for key in ("val", "test")}
    yaml_text = dataset_yaml({k: f"images/{s}" for k, s in keys.items() if s}, names, more=more)
    sources = {out / "images" / i.name: i.source for i in images if i.source is not None}
    new = [target for target, source in sources.items() if not same_file(source, target)]
    refuse_existing([*texts, *new, out / "data.yaml"], exist_ok=exist_ok)
    for path, text in texts.items():
        write_text(path, text)
    for target, source in sources.items():
        place_image(source, target)
    write_text(out / "data.yaml", yaml_text)
    placed = f", {len(sources)} images" if sources else ""
    objects = sum(len(i.labels.classes) for i in images)
    return f"{len(texts)} label files{placed}, {objects} objects of {len(names)} classes in {out / 'data.yaml'}"


def _refuse_two_writers(paths: Sequence[Path], images: Sequence[Converted]) -> None:
    """Raises UserError where two images share a label file, or one image is written under two names."""
    writers: dict[str, Converted] = {}
    for path, image in zip(paths, images):
        shared = [(f"label file {path}", str(path))]
        shared += [(f"image {image.source}", f"image {os.path.realpath(image.source)}")] if image.source else []
        for shown, key in shared:
            other = writers.setdefault(key, image)
            if other is not image:
                raise UserError(f"the {shown} would be that of both {other.origin} and {image.origin}; rename one, or convert them apart")


def _label_text_of(labels: ImageLabels, segments: bool) -> str:
    polygons = [joined(rings) for rings in build_table([labels]).instances(0, hw=(1, 1)).outlines()] if segments else []
    return label_text(labels.classes, labels.boxes_cxcywh, polygons, keypoints=None if segments else labels.keypoints)


def print_image_folders(out: Path, splits: Sequence[str], *, have_images: bool) -> None:
    """Says where the images belong, where only labels were written."""
    if not have_images:
        print(f"put the images into {', '.join(str(out / 'images' / s) for s in splits)}, or give their folders with --images")


def label_text(
    classes: np.ndarray, boxes_cxcywh: np.ndarray, polygons: Sequence[np.ndarray] = (), *, keypoints: np.ndarray | None = None
) -> str:
    """The rows of a label file.

    Args:
        classes: (n,).
        boxes_cxcywh: (n, 4) normalised; written with the fewest digits that identify a float32.
        polygons: (k, 2) normalised points of each object, written in place of its box if not empty.
        keypoints: (n, K, 3) normalised with visibility, written after the box.
    """
    rows = []
    for i, (label, box) in enumerate(zip(classes, boxes_cxcywh)):
        values = polygons[i].ravel() if len(polygons) and len(polygons[i]) else box
        points = [] if keypoints is None else [text for x, y, v in keypoints[i] for text in (str(x), str(y), str(int(v)))]
        rows.append(" ".join((str(int(label)), *(str(v) for v in values.astype(np.float32)), *points)))
    return "".join(f"{row}\n" for row in rows)


def refuse_existing(paths: Iterable[Path], *, exist_ok: bool) -> None:
    """Checks, before anything is written, that no file would be overwritten.

    Raises:
        UserError: one of the files exists.
    """
    existing = [] if exist_ok else [p for p in paths if os.path.lexists(p)]
    if existing:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise UserError(f"{existing[0]}{more}: exists already; give another --out, or --exist-ok to write over it")


def write_text(path: Path, text: str) -> None:
    """Writes to a new file that then replaces the old one; so a linked original is never written into.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def place_image(source: str | Path, target: Path) -> None:
    """Makes a hard link to an image, or a copy where links are not possible; nothing if the target is the image already.

    Raises:
        UserError: neither is possible.
    """
    try:
        if same_file(source, target):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(source), target)
        except OSError:
            shutil.copy2(source, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to one file."""
    return os.path.exists(other) and os.path.samefile(one, other)


def dataset_yaml(splits: Mapping[str, str], names: Sequence[str], *, more: Mapping[str, Any] | None = None) -> str:
    """The text of a dataset file that lies in the data set's own folder."""
    content = {**splits, **(more or {}), "names": dict(enumerate(names))}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


class ReadFile(Protocol):
    """A label file of another format, as its reader gives it."""

    @property
    def labels(self) -> Sequence[str]: ...
    @property
    def difficult(self) -> int: ...
    @property
    def problems(self) -> Sequence[Problem]: ...


def names_of(read: Sequence[ReadFile], annotations: Path) -> tuple[str, ...]:
    """All class names that occur, sorted. Raises UserError where there is none."""
    names = tuple(sorted({label for f in read for label in f.labels}))
    if not names:
        first = next((f", first: {f.problems[0]}" for f in read if f.problems), "")
        raise UserError(f"{annotations}: no object in {len(read)} files{first}")
    return names


def print_written(written: str, read: Sequence[ReadFile]) -> None:
    """What was written, and how many difficult objects were not."""
    skipped = sum(f.difficult for f in read)
    print(written + (f"; {skipped} difficult objects left out (--difficult keeps them)" if skipped else ""))
