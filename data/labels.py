"""Label files read, checked and put into flat arrays: one line for every problem, with file and row, and a summary at the end.

What a problem costs: a picture that cannot be decoded, or whose label file has a faulty row, is left out (half-labelled pictures would
teach the model that objects are background); duplicate rows and boxes without area are dropped. A class that the dataset file has no
name for stops the run, because then the dataset file is wrong.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.bands import without_stored_arrays
from data.images import ImageError, is_image, probe_image
from data.instances import Instances
from utils.errors import UserError

ROUNDING = 1e-3  # how far outside 0-1 a coordinate may lie and still be clipped: labels are written with few digits
PROCESSES_FROM = 1000  # pictures; below, starting processes takes longer than they save
EXPECTED = "expected: class cx cy w h, or class x1 y1 x2 y2 x3 y3 … (a polygon)"


class Problem(NamedTuple):
    """One thing wrong with the data."""

    path: str
    row: int  # from 1; 0 when it is about the whole file
    message: str
    skips: bool  # whether the picture was left out

    def __str__(self) -> str:
        return f"{self.path}:{self.row}: {self.message}" if self.row else f"{self.path}: {self.message}"


class FileLabels(NamedTuple):
    """What one picture and its label file gave."""

    hw: tuple[int, int]  # (0, 0) when the picture is left out
    has_label_file: bool
    classes: np.ndarray  # (n,) int64
    boxes_cxcywh: np.ndarray  # (n, 4) float32, normalised
    rows: np.ndarray  # (n,) int64, from 1
    points: np.ndarray  # (p, 2) float32, normalised
    counts: np.ndarray  # (n,) int64
    problems: tuple[Problem, ...] = ()


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """The labels of a whole data set in a handful of flat arrays, cheap to store, to share between processes and to index.

    Attributes:
        shapes_hw: (N, 2) int64 height and width of every picture in px; zeros for those left out.
        has_label_file: (N,) bool.
        starts: (N + 1,) int64, objects of picture i are ``starts[i]:starts[i + 1]``.
        classes: (M,) int64.
        boxes_cxcywh: (M, 4) float32, normalised.
        rows: (M,) int64, row in the label file, from 1.
        point_starts: (M + 1,) int64, polygon of object j is ``point_starts[j]:point_starts[j + 1]`` (empty: only a box).
        points: (P, 2) float32, normalised.
        problems: Everything wrong that was found.
    """

    shapes_hw: np.ndarray
    has_label_file: np.ndarray
    starts: np.ndarray
    classes: np.ndarray
    boxes_cxcywh: np.ndarray
    rows: np.ndarray
    point_starts: np.ndarray
    points: np.ndarray
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.shapes_hw)

    def instances(self, i: int, *, hw: tuple[int, int]) -> Instances:
        """Objects of picture i in px of a version of it that is ``hw`` px large."""
        h, w = hw
        start, stop = self.starts[i], self.starts[i + 1]
        cxcywh = self.boxes_cxcywh[start:stop]
        half = cxcywh[:, 2:] / 2
        boxes = np.concatenate((cxcywh[:, :2] - half, cxcywh[:, :2] + half), 1) * np.array((w, h, w, h), np.float32)
        point_starts = self.point_starts[start : stop + 1]
        points = self.points[point_starts[0] : point_starts[-1]] * np.array((w, h), np.float32)
        return Instances(self.classes[start:stop].astype(np.float32), boxes, points, np.diff(point_starts))

    def array(self, i: int) -> np.ndarray:
        """(n, 5) float32 [class, cx, cy, w, h] of picture i."""
        part = slice(self.starts[i], self.starts[i + 1])
        return np.concatenate((self.classes[part, None].astype(np.float32), self.boxes_cxcywh[part]), 1)

    def as_one_class(self) -> LabelTable:
        """The same objects, all of class 0."""
        return dataclasses.replace(self, classes=np.zeros_like(self.classes))

    def take(self, keep: np.ndarray) -> LabelTable:
        """The table of the pictures where ``keep`` (N,) is true."""
        objects = np.repeat(keep, np.diff(self.starts))
        points = np.repeat(objects, np.diff(self.point_starts))
        return dataclasses.replace(
            self,
            shapes_hw=self.shapes_hw[keep],
            has_label_file=self.has_label_file[keep],
            starts=_starts(np.diff(self.starts)[keep]),
            classes=self.classes[objects],
            boxes_cxcywh=self.boxes_cxcywh[objects],
            rows=self.rows[objects],
            point_starts=_starts(np.diff(self.point_starts)[objects]),
            points=self.points[points],
        )


def list_images(sources: Sequence[Path]) -> list[str]:
    """All picture files of the sources (folders with everything below them, .txt lists, single pictures), sorted within each.

    Raises:
        UserError: Nothing found.
    """
    files: list[str] = []
    for source in sources:
        if source.is_dir():
            tree = os.walk(source, followlinks=True)
            files += without_stored_arrays(sorted(str(Path(top) / name) for top, _, names in tree for name in names if is_image(name)))
        elif source.suffix == ".txt":
            files += read_list(source)
        else:
            files.append(str(source))
    files = list(dict.fromkeys(files))
    if not files:
        raise UserError(f"no images in {', '.join(map(str, sources))}; a folder of pictures or a .txt list of their paths is expected")
    return files


def read_list(path: Path) -> list[str]:
    """Picture paths from a list, each absolute, or relative to the list's folder or the working directory."""
    entries = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()]
    entries = [e for e in entries if e and not e.startswith("#")]
    relative = next((e for e in entries if not os.path.isabs(e)), None)
    bases = [path.parent, Path.cwd()]
    base = next((b for b in bases if relative and (b / relative).exists()), bases[0])
    return [os.path.normpath(base / e) for e in entries]


def label_path(image_path: str) -> str:
    """The label file of a picture: the last ``/images/`` becomes ``/labels/``, the suffix ``.txt``; else it lies beside it."""
    head, slash, name = image_path.replace(os.sep, "/").rpartition("/images/")
    path = f"{head}/labels/{name}" if slash else image_path
    return str(Path(path).with_suffix(".txt"))


def read_labels(
    image_files: Sequence[str], *, channels: int = 3, workers: int = 8, prefix: str = "", progress: bool = True
) -> LabelTable:
    """Reads and checks the labels of all pictures in parallel, with a progress bar.

    Args:
        image_files: N pictures.
        channels: That the pictures should have.
        workers: Most parallel readers. Up to 1000 pictures are read by threads, more by processes.
        prefix: Words before the progress bar.
        progress: Whether to show it.
    """
    workers = max(1, min(workers, os.cpu_count() or 1))
    pool: Executor
    if len(image_files) >= PROCESSES_FROM and workers > 1:
        pool, chunk = ProcessPoolExecutor(workers), 64
    else:
        pool, chunk = ThreadPoolExecutor(workers), 1
    with pool:
        results = pool.map(partial(read_file_labels, channels=channels), image_files, chunksize=chunk)
        bar = tqdm(results, total=len(image_files), desc=f"{prefix}reading labels", unit="image", disable=not progress, leave=False)
        return build_table(list(bar))


def build_table(files: Sequence[FileLabels]) -> LabelTable:
    """The flat arrays for what the single files gave."""

    def joined(name: str, template: np.ndarray) -> np.ndarray:
        return np.concatenate([template, *(getattr(f, name) for f in files)])

    return LabelTable(
        shapes_hw=np.array([f.hw for f in files], np.int64).reshape(-1, 2),
        has_label_file=np.array([f.has_label_file for f in files], bool),
        starts=_starts(np.array([len(f.classes) for f in files], np.int64)),
        classes=joined("classes", np.zeros(0, np.int64)),
        boxes_cxcywh=joined("boxes_cxcywh", np.zeros((0, 4), np.float32)),
        rows=joined("rows", np.zeros(0, np.int64)),
        point_starts=_starts(joined("counts", np.zeros(0, np.int64))),
        points=joined("points", np.zeros((0, 2), np.float32)),
        problems=tuple(p for f in files for p in f.problems),
    )


def read_file_labels(image_file: str, *, channels: int = 3) -> FileLabels:
    """Checks one picture and reads its label file. Nothing wrong with either raises: it is in ``problems``."""
    path = label_path(image_file)
    try:
        hw = probe_image(image_file, channels=channels)
    except ImageError as error:
        message = str(error).removeprefix(f"{image_file}: ")
        return _no_labels((0, 0), os.path.isfile(path), (Problem(image_file, 0, message, True),))
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return _no_labels(hw, False)
    except (OSError, UnicodeDecodeError) as error:
        reason = "not a text file" if isinstance(error, UnicodeDecodeError) else error.strerror
        return _no_labels((0, 0), True, (Problem(path, 0, f"label file cannot be read: {reason}", True),))
    return parse_labels(text, path, hw)


def parse_labels(text: str, path: str, hw: tuple[int, int]) -> FileLabels:
    """Reads the rows of a label file.

    Args:
        text: Its content; rows ``class cx cy w h`` or ``class x1 y1 x2 y2 x3 y3 …``, normalised to 0-1; both may occur in one file.
        path: Its name, for messages.
        hw: Size of the picture in px.
    """
    classes, boxes, rows, points, problems = [], [], [], [], []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        values, fault = _parse_row(fields)
        if fault:
            problems.append(Problem(path, number, fault, True))
            continue
        polygon = values[1:].reshape(-1, 2) if len(values) > 5 else np.zeros((0, 2))
        low_high = np.concatenate((polygon.min(0), polygon.max(0))) if len(polygon) else np.zeros(4)
        box = np.concatenate(((low_high[:2] + low_high[2:]) / 2, low_high[2:] - low_high[:2])) if len(polygon) else values[1:]
        if not (box[2:] > 0).all():
            problems.append(Problem(path, number, "a box without area, dropped", False))
            continue
        classes.append(int(values[0]))
        boxes.append(box)
        rows.append(number)
        points.append(polygon)
    if any(p.skips for p in problems):
        return _no_labels((0, 0), True, tuple(problems))
    found = FileLabels(
        hw, True, np.array(classes, np.int64), np.array(boxes, np.float32).reshape(-1, 4), np.array(rows, np.int64),
        np.concatenate([np.zeros((0, 2)), *points]).astype(np.float32), np.array([len(p) for p in points], np.int64), tuple(problems),
    )  # fmt: skip
    return _without_duplicates(found, path)


def check_classes(table: LabelTable, image_files: Sequence[str], names: Sequence[str], yaml_path: Path) -> None:
    """Refuses labels of classes that have no name.

    Raises:
        UserError: Names the file and row of the first one, and how many there are.
    """
    bad = np.flatnonzero(table.classes >= len(names))
    if not len(bad):
        return
    i = int(np.searchsorted(table.starts, bad[0], side="right")) - 1
    more = f" ({len(bad)} such rows)" if len(bad) > 1 else ""
    raise UserError(
        f"{label_path(image_files[i])}:{table.rows[bad[0]]}: class {table.classes[bad[0]]}, but {yaml_path} has {len(names)} classes "
        f"(0 to {len(names) - 1}){more}; add its name there or correct the label"
    )


def summarise(table: LabelTable, *, prefix: str = "", shown: int = 20) -> str:
    """What was found, then the problems, one a line (at most ``shown``)."""
    skipped = len({p.path for p in table.problems if p.skips})
    used = int((table.shapes_hw[:, 0] > 0).sum())
    objects = np.diff(table.starts)
    background = int(((objects == 0) & (table.shapes_hw[:, 0] > 0)).sum())
    lines = [f"{prefix}{used} images, {len(table.classes)} objects, {background} images without objects, {skipped} images left out"]
    lines += [f"  {'left out: ' if p.skips else ''}{p}" for p in table.problems[:shown]]
    if len(table.problems) > shown:
        lines.append(f"  … and {len(table.problems) - shown} more problems")
    return "\n".join(lines)


def _parse_row(fields: list[str]) -> tuple[np.ndarray, str]:
    """The numbers of a row, clipped to 0-1, and what is wrong with them (empty: nothing)."""
    nothing = np.zeros(0)
    count = len(fields)
    if count != 5 and (count < 7 or count % 2 == 0):
        return nothing, f"{count} columns, {EXPECTED}"
    try:
        values = np.array(fields, np.float64)
    except ValueError:
        return nothing, f"not a number in {' '.join(fields)[:60]!r}, {EXPECTED}"
    if not np.isfinite(values).all():
        return nothing, "NaN or infinity, finite numbers are expected"
    if values[0] < 0 or values[0] != int(values[0]):
        return nothing, f"class {fields[0]}, a whole number from 0 is expected"
    out = np.flatnonzero((values[1:] < -ROUNDING) | (values[1:] > 1 + ROUNDING))
    if len(out):
        return nothing, f"coordinate {fields[1 + out[0]]} in column {out[0] + 2}, values normalised to 0-1 are expected"
    values[1:] = values[1:].clip(0, 1)
    return values, ""


def _without_duplicates(labels: FileLabels, path: str) -> FileLabels:
    if len(labels.classes) < 2:
        return labels
    keyed = np.concatenate((labels.classes[:, None], labels.boxes_cxcywh), 1)
    _, first = np.unique(keyed, axis=0, return_index=True)
    keep = np.zeros(len(keyed), bool)
    keep[first] = True
    if keep.all():
        return labels
    dropped = Problem(path, int(labels.rows[~keep][0]), f"{int((~keep).sum())} duplicate rows, dropped", False)
    return labels._replace(
        classes=labels.classes[keep], boxes_cxcywh=labels.boxes_cxcywh[keep], rows=labels.rows[keep], counts=labels.counts[keep],
        points=labels.points[np.repeat(keep, labels.counts)], problems=(*labels.problems, dropped),
    )  # fmt: skip


def _no_labels(hw: tuple[int, int], has_label_file: bool, problems: tuple[Problem, ...] = ()) -> FileLabels:
    none = np.zeros(0, np.int64)
    return FileLabels(hw, has_label_file, none, np.zeros((0, 4), np.float32), none, np.zeros((0, 2), np.float32), none, problems)


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))
