"""Label files read, checked and put into flat arrays: one line for every problem, with file and row, and a summary at the end.

What a problem costs: an image that cannot be decoded, or whose label file has a faulty row, is left out (half-labelled images would
teach the model that objects are background); duplicate rows and boxes without area are dropped. Classes that the dataset file has no
name for stop the run where they are many, because then the dataset file is wrong.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from data.images.bands import without_stored_arrays
from data.images.reading import ImageError, is_image, probe_image
from data.labels.problems import (
    COLUMNS,
    CORRUPT,
    DUPLICATE_ROWS,
    LABEL_FILE,
    MISSING,
    NO_AREA,
    NOT_A_NUMBER,
    NOT_FINITE,
    OUT_OF_RANGE,
    WRONG_CLASS,
    Problem,
)
from utils.errors import UserError
from utils.instances import Instances

ROUNDING = 1e-3  # how far outside 0-1 a coordinate may lie and still be clipped: labels are written with few digits
PROCESSES_FROM = 1000  # images; below, starting processes takes longer than they save
HIGHEST_CLASS = 1_000_000
WRONG_CLASSES_PART = 0.1  # of the images with objects; more of them with nameless classes mean that the dataset file is wrong
EXPECTED = "expected: class cx cy w h, or class x1 y1 x2 y2 x3 y3 … (a polygon)"

Result = TypeVar("Result")


class FileLabels(NamedTuple):
    """What one image and its label file gave."""

    hw: tuple[int, int]  # (0, 0) when the image is left out
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
        shapes_hw: (N, 2) int64 height and width of every image in px; zeros for those left out.
        has_label_file: (N,) bool.
        starts: (N + 1,) int64, objects of image i are ``starts[i]:starts[i + 1]``.
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
        """Objects of image i in px of a version of it that is ``hw`` px large."""
        h, w = hw
        start, stop = self.starts[i], self.starts[i + 1]
        cxcywh = self.boxes_cxcywh[start:stop]
        half = cxcywh[:, 2:] / 2
        boxes = np.concatenate((cxcywh[:, :2] - half, cxcywh[:, :2] + half), 1) * np.array((w, h, w, h), np.float32)
        point_starts = self.point_starts[start : stop + 1]
        points = self.points[point_starts[0] : point_starts[-1]] * np.array((w, h), np.float32)
        return Instances(self.classes[start:stop].astype(np.float32), boxes, points, np.diff(point_starts))

    def array(self, i: int) -> np.ndarray:
        """(n, 5) float32 [class, cx, cy, w, h] of image i."""
        part = slice(self.starts[i], self.starts[i + 1])
        return np.concatenate((self.classes[part, None].astype(np.float32), self.boxes_cxcywh[part]), 1)

    def as_one_class(self) -> LabelTable:
        """The same objects, all of class 0."""
        return dataclasses.replace(self, classes=np.zeros_like(self.classes))

    def take(self, keep: np.ndarray) -> LabelTable:
        """The table of the images where ``keep`` (N,) is true."""
        kept = self._with_objects_of(keep)
        return dataclasses.replace(
            kept, shapes_hw=self.shapes_hw[keep], has_label_file=self.has_label_file[keep], starts=_starts(np.diff(self.starts)[keep])
        )

    def exclude(self, out: np.ndarray, problems: Sequence[Problem]) -> LabelTable:
        """The table with the images where ``out`` (N,) is true marked as unusable, and why."""
        return dataclasses.replace(
            self._with_objects_of(~out), shapes_hw=np.where(out[:, None], 0, self.shapes_hw),
            starts=_starts(np.where(out, 0, np.diff(self.starts))), problems=(*self.problems, *problems),
        )  # fmt: skip

    def _with_objects_of(self, keep: np.ndarray) -> LabelTable:
        """Only the objects of some images; ``starts`` is for the caller to mend."""
        objects = np.repeat(keep, np.diff(self.starts))
        points = np.repeat(objects, np.diff(self.point_starts))
        return dataclasses.replace(
            self,
            classes=self.classes[objects],
            boxes_cxcywh=self.boxes_cxcywh[objects],
            rows=self.rows[objects],
            point_starts=_starts(np.diff(self.point_starts)[objects]),
            points=self.points[points],
        )


def list_images(sources: Sequence[Path]) -> list[str]:
    """All image files of the sources (folders with everything below them, .txt lists, single images), sorted within each.

    Raises:
        UserError: Nothing found.
    """
    found: list[str] = []
    for source in sources:
        if source.is_dir():
            tree = os.walk(source, followlinks=True)  # folders that are named like images are listed too, to be found unusable
            names = (os.path.join(top, name) for top, folders, files in tree for name in (*files, *folders) if is_image(name))
            found += without_stored_arrays(sorted(names))
        elif source.suffix == ".txt":
            found += read_list(source)
        else:
            found.append(str(source))
    found = list(dict.fromkeys(found))
    if not found:
        raise UserError(f"no images in {', '.join(map(str, sources))}; a folder of images or a .txt list of their paths is expected")
    return found


def read_list(path: Path) -> list[str]:
    """Image paths from a list, each absolute, or relative to the list's folder or the working directory."""
    entries = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()]
    entries = [e for e in entries if e and not e.startswith("#")]
    relative = next((e for e in entries if not os.path.isabs(e)), None)
    bases = [path.parent, Path.cwd()]
    base = next((b for b in bases if relative and (b / relative).exists()), bases[0])
    return [os.path.normpath(base / e) for e in entries]


def label_path(image_path: str) -> str:
    """The label file of an image: the last ``/images/`` becomes ``/labels/``, the suffix ``.txt``; else it lies beside it."""
    head, slash, name = image_path.replace(os.sep, "/").rpartition("/images/")
    path = f"{head}/labels/{name}" if slash else image_path
    return str(Path(path).with_suffix(".txt"))


def read_labels(
    image_files: Sequence[str], *, channels: int = 3, workers: int = 8, prefix: str = "", progress: bool = True
) -> LabelTable:
    """Reads and checks the labels of all images in parallel, with a progress bar.

    Args:
        image_files: N images.
        channels: That the images should have.
        workers: Most parallel readers. Up to 1000 images are read by threads, more by processes.
        prefix: Words before the progress bar.
        progress: Whether to show it.
    """
    read = partial(read_file_labels, channels=channels)
    return build_table(map_images(read, image_files, workers=workers, what=f"{prefix}reading labels", progress=progress))


def map_images(
    function: Callable[[str], Result], image_files: Sequence[str], *, workers: int, what: str, progress: bool = True
) -> list[Result]:
    """``function`` of every image, in parallel and in order. It must be picklable."""
    workers = max(1, min(workers, os.cpu_count() or 1))
    pool: Executor
    if len(image_files) >= PROCESSES_FROM and workers > 1:
        pool, chunk = ProcessPoolExecutor(workers), 64
    else:
        pool, chunk = ThreadPoolExecutor(workers), 1
    with pool:
        results = pool.map(function, image_files, chunksize=chunk)
        return list(tqdm(results, total=len(image_files), desc=what, unit="image", disable=not progress, leave=False))


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
    """Checks one image and reads its label file. Nothing wrong with either raises: it is in ``problems``."""
    path = label_path(image_file)
    probed = probe_file(image_file, channels=channels)
    if probed.problems:
        return probed._replace(has_label_file=os.path.isfile(path))
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return no_labels((0, 0), True, (Problem(path, 0, "label file cannot be read: not a file", True, LABEL_FILE),))
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return probed
    except (OSError, UnicodeDecodeError) as error:
        reason = "not a text file in UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        return no_labels((0, 0), True, (Problem(path, 0, f"label file cannot be read: {reason}", True, LABEL_FILE),))
    return parse_labels(text, path, probed.hw)


def probe_file(image_file: str, *, channels: int = 3) -> FileLabels:
    """Checks one image: its size and no objects, or what is wrong with it."""
    try:
        return no_labels(probe_image(image_file, channels=channels), False)
    except ImageError as error:
        kind = CORRUPT if os.path.lexists(image_file) else MISSING
        return no_labels((0, 0), False, (Problem(image_file, 0, str(error).removeprefix(f"{image_file}: "), True, kind),))


def parse_labels(text: str, path: str, hw: tuple[int, int]) -> FileLabels:
    """Reads the rows of a label file.

    Args:
        text: Its content; rows ``class cx cy w h`` or ``class x1 y1 x2 y2 x3 y3 …``, normalised to 0-1; both may occur in one file.
        path: Its name, for messages.
        hw: Size of the image in px.
    """
    classes, boxes, rows, points, problems = [], [], [], [], []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        values, fault = _parse_row(fields)
        if fault:
            problems.append(Problem(path, number, fault.message, True, fault.kind))
            continue
        polygon = values[1:].reshape(-1, 2) if len(values) > 5 else np.zeros((0, 2))
        low_high = np.concatenate((polygon.min(0), polygon.max(0))) if len(polygon) else np.zeros(4)
        box = np.concatenate(((low_high[:2] + low_high[2:]) / 2, low_high[2:] - low_high[:2])) if len(polygon) else values[1:]
        if not (box[2:] > 0).all() or (len(polygon) and len(np.unique(polygon, axis=0)) < 3):
            problems.append(Problem(path, number, f"a {'polygon' if len(polygon) else 'box'} without area, dropped", False, NO_AREA))
            continue
        classes.append(int(values[0]))
        boxes.append(box)
        rows.append(number)
        points.append(polygon)
    if any(p.skips for p in problems):
        return no_labels((0, 0), True, tuple(problems))
    found = FileLabels(
        hw, True, np.array(classes, np.int64), np.array(boxes, np.float32).reshape(-1, 4), np.array(rows, np.int64),
        np.concatenate([np.zeros((0, 2)), *points]).astype(np.float32), np.array([len(p) for p in points], np.int64), tuple(problems),
    )  # fmt: skip
    return without_duplicates(found, path)


def check_classes(table: LabelTable, image_files: Sequence[str], names: Sequence[str], yaml_path: Path) -> LabelTable:
    """Leaves out the images with objects of classes that have no name.

    Raises:
        UserError: They are more than a tenth of the images with objects; names the file and row of the first one.
    """
    out, problems = nameless_objects(table, image_files, names, yaml_path)
    if len(problems) > WRONG_CLASSES_PART * np.count_nonzero(np.diff(table.starts)):
        count = int((table.classes >= len(names)).sum())
        more = f" ({count} such rows)" if count > 1 else ""
        raise UserError(f"{problems[0]}{more}; add its name there or correct the label")
    return table.exclude(out, problems) if problems else table


def nameless_objects(
    table: LabelTable, image_files: Sequence[str], names: Sequence[str], yaml_path: Path
) -> tuple[np.ndarray, list[Problem]]:
    """Which images (N,) have objects of classes without a name, and a line for each."""
    bad = np.flatnonzero(table.classes >= len(names))
    images, first = np.unique(np.searchsorted(table.starts, bad, side="right") - 1, return_index=True)
    known = f"but {yaml_path} has {len(names)} classes (0 to {len(names) - 1})"
    problems = [
        Problem(label_path(image_files[i]), int(table.rows[j]), f"class {table.classes[j]}, {known}", True, WRONG_CLASS)
        for i, j in zip(images, bad[first])
    ]
    return np.isin(np.arange(len(table)), images), problems


def summarise(table: LabelTable, *, prefix: str = "", shown: int = 20) -> str:
    """What was found, then the problems, one a line (at most ``shown``)."""
    skipped = len({p.path for p in table.problems if p.skips})
    used = int((table.shapes_hw[:, 0] > 0).sum())
    objects = np.diff(table.starts)
    background = int(((objects == 0) & (table.shapes_hw[:, 0] > 0)).sum())
    lines = [f"{prefix}{used} images, {len(table.classes)} objects, {background} images without objects, {skipped} images left out"]
    lines += [f"  {p.line()}" for p in table.problems[:shown]]
    if len(table.problems) > shown:
        lines.append(f"  … and {len(table.problems) - shown} more problems")
    return "\n".join(lines)


class Fault(NamedTuple):
    """What is wrong with a row."""

    message: str
    kind: str


def _parse_row(fields: list[str]) -> tuple[np.ndarray, Fault | None]:
    """The numbers of a row, clipped to 0-1, and what is wrong with them."""
    nothing = np.zeros(0)
    count = len(fields)
    if count != 5 and (count < 7 or count % 2 == 0):
        return nothing, Fault(f"{count} columns, {EXPECTED}", COLUMNS)
    try:
        values = np.array(fields, np.float64)
    except ValueError:
        return nothing, Fault(f"not a number in {' '.join(fields)[:60]!r}, {EXPECTED}", NOT_A_NUMBER)
    if not np.isfinite(values).all():
        return nothing, Fault("NaN or infinity, finite numbers are expected", NOT_FINITE)
    if not 0 <= values[0] <= HIGHEST_CLASS or values[0] != int(values[0]):
        return nothing, Fault(f"class {fields[0]}, a whole number from 0 is expected", WRONG_CLASS)
    out = np.flatnonzero((values[1:] < -ROUNDING) | (values[1:] > 1 + ROUNDING))
    if len(out):
        message = f"coordinate {fields[1 + out[0]]} in column {out[0] + 2}, values normalised to 0-1 are expected"
        return nothing, Fault(message, OUT_OF_RANGE)
    values[1:] = values[1:].clip(0, 1)
    return values, None


def without_duplicates(labels: FileLabels, path: str) -> FileLabels:
    """Without rows that say what an earlier one does; their number is told as a problem of the file ``path``."""
    if len(labels.classes) < 2:
        return labels
    keyed = np.concatenate((labels.classes[:, None], labels.boxes_cxcywh), 1)
    _, first = np.unique(keyed, axis=0, return_index=True)
    keep = np.zeros(len(keyed), bool)
    keep[first] = True
    if keep.all():
        return labels
    dropped = Problem(path, int(labels.rows[~keep][0]), f"{int((~keep).sum())} duplicate rows, dropped", False, DUPLICATE_ROWS)
    return labels._replace(
        classes=labels.classes[keep], boxes_cxcywh=labels.boxes_cxcywh[keep], rows=labels.rows[keep], counts=labels.counts[keep],
        points=labels.points[np.repeat(keep, labels.counts)], problems=(*labels.problems, dropped),
    )  # fmt: skip


def no_labels(hw: tuple[int, int], has_label_file: bool, problems: tuple[Problem, ...] = ()) -> FileLabels:
    """An image without objects; one that is left out has the size (0, 0)."""
    none = np.zeros(0, np.int64)
    return FileLabels(hw, has_label_file, none, np.zeros((0, 4), np.float32), none, np.zeros((0, 2), np.float32), none, problems)


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))
