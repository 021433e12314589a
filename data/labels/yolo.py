"""YOLO label files, read and checked: one problem for every invalid row, with file and row number."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from data.labels.checks import drop_duplicates
from data.labels.files import find_label_file
from data.labels.probing import map_images, probe_labels
from data.labels.problems import LABEL_FILE, Problem
from data.labels.table import ImageLabels, LabelTable, breaks_of, build_table
from tasks import DETECT
from tasks.rows import COLUMNS, InvalidRow, LabelRow
from utils.files import read_bounded
from utils.reading.limits import MAX_LABEL_BYTES

ParseRow = Callable[[Sequence[str]], LabelRow | InvalidRow]


def read_labels(
    image_files: Sequence[str],
    *,
    parse_row: ParseRow = DETECT.parse_row,
    channels: int = 3,
    workers: int = 8,
    prefix: str = "",
    progress: bool = True,
) -> LabelTable:
    """Reads and checks the labels of all images in parallel, with a progress bar.

    Args:
        image_files: N images.
        parse_row: reads the columns of a row; must be picklable.
        channels: that the images should have.
        workers: most parallel readers. Up to 1000 images are read by threads, more by processes.
        prefix: words before the progress bar.
        progress: whether to show it.
    """
    read = partial(read_image_labels, parse_row=parse_row, channels=channels)
    return build_table(map_images(read, image_files, workers=workers, title=f"{prefix}reading labels", progress=progress))


def read_image_labels(image_file: str, *, parse_row: ParseRow = DETECT.parse_row, channels: int = 3) -> ImageLabels:
    """Checks one image and reads its label file. Nothing wrong with either raises: it is in ``problems``."""
    path = find_label_file(image_file)
    probed = probe_labels(image_file, channels=channels)
    if not probed.is_usable:
        return probed._replace(has_label_file=os.path.isfile(path))
    try:
        text = read_bounded(path, limit=MAX_LABEL_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        return probed
    except UnicodeDecodeError:
        return _unreadable(path, "not a text file in UTF-8")
    except OSError as error:
        return _unreadable(path, str(error.strerror or error))
    return parse_labels(text, path, probed.hw, parse_row=parse_row)


def parse_labels(text: str, path: str, hw: tuple[int, int], *, parse_row: ParseRow = DETECT.parse_row) -> ImageLabels:
    """Reads the rows of a label file.

    Args:
        text: its content, one object a row, coordinates normalised to 0-1.
        path: its name, for messages.
        hw: size of the image in px.
        parse_row: reads the columns of a row.
    """
    found: list[LabelRow] = []
    numbers: list[int] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), start=1):
        columns = line.split()
        if not columns:
            continue
        row = parse_row(columns)
        if isinstance(row, InvalidRow):
            hint = "; spaces separate columns, not commas" if row.kind == COLUMNS and "," in line else ""
            problems.append(Problem(path, number, f"{row.message}{hint}", row.skips_image, row.kind))
        else:
            found.append(row)
            numbers.append(number)
    if any(p.skips for p in problems):
        return ImageLabels.unusable(*problems, has_label_file=True)
    labels = ImageLabels(
        hw=hw,
        has_label_file=True,
        classes=np.array([row.class_index for row in found], np.int64),
        boxes_cxcywh=np.array([row.box_cxcywh for row in found], np.float32).reshape(-1, 4),
        rows=np.array(numbers, np.int64),
        points=np.concatenate([np.zeros((0, 2)), *(row.polygon for row in found)]).astype(np.float32),
        counts=np.array([len(row.polygon) for row in found], np.int64),
        problems=tuple(problems),
        keypoints=_stack_keypoints(found),
        breaks=breaks_of([row.rings or (len(row.polygon),) for row in found]),
    )
    return drop_duplicates(labels, path)


def _stack_keypoints(rows: Sequence[LabelRow]) -> np.ndarray | None:
    """(n, K, 3) float32, None where the rows have no keypoints."""
    keypoints = [row.keypoints for row in rows if row.keypoints is not None]
    return np.stack(keypoints).astype(np.float32) if keypoints else None


def _unreadable(path: str, reason: str) -> ImageLabels:
    return ImageLabels.unusable(Problem(path, 0, f"label file cannot be read: {reason}", True, LABEL_FILE), has_label_file=True)
