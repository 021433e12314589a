"""Checks of labels that were read: duplicate rows, classes without a name, and the summary that a user sees.

What a problem costs: an image that cannot be decoded, or whose label file has an invalid row, is left out (half-labelled images would
teach the model that objects are background); duplicate rows and boxes without area are dropped. Classes that the dataset file has no
name for stop the run where they are many, because then the dataset file is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.labels.files import find_label_file
from data.labels.problems import DUPLICATE_ROWS, WRONG_CLASS, Problem
from data.labels.table import ImageLabels, LabelTable
from utils.errors import UserError

MAX_NAMELESS_PART = 0.1  # of the images with objects; if more have classes without a name, the dataset file is wrong


def drop_duplicates(labels: ImageLabels, path: str) -> ImageLabels:
    """Without rows that repeat an earlier one; their number becomes a problem of the file ``path``."""
    if len(labels.classes) < 2:
        return labels
    keyed = np.concatenate((labels.classes[:, None], labels.boxes_cxcywh), 1)
    _, first = np.unique(keyed, axis=0, return_index=True)
    keep = np.zeros(len(keyed), bool)
    keep[first] = True
    if keep.all():
        return labels
    dropped = Problem(path, int(labels.rows[~keep][0]), f"{int((~keep).sum())} duplicate rows, dropped", False, DUPLICATE_ROWS)
    return labels.select(keep)._replace(problems=(*labels.problems, dropped))


def check_classes(table: LabelTable, image_files: Sequence[str], names: Sequence[str], yaml_path: Path) -> LabelTable:
    """Leaves out the images with objects of classes that have no name.

    Raises:
        UserError: they are more than a tenth of the images with objects; names the file and row of the first one.
    """
    nameless, problems = find_nameless_objects(table, image_files, names, yaml_path)
    if len(problems) > MAX_NAMELESS_PART * np.count_nonzero(table.counts):
        count = int((table.classes >= len(names)).sum())
        more = f" ({count} such rows)" if count > 1 else ""
        raise UserError(f"{problems[0]}{more}; add its name there or correct the label")
    return table.mark_unusable(nameless, problems) if problems else table


def find_nameless_objects(
    table: LabelTable, image_files: Sequence[str], names: Sequence[str], yaml_path: Path
) -> tuple[np.ndarray, list[Problem]]:
    """Which images (N,) have objects of classes without a name, and a problem for each."""
    bad = np.flatnonzero(table.classes >= len(names))
    images, first = np.unique(np.searchsorted(table.starts, bad, side="right") - 1, return_index=True)
    known = f"but {yaml_path} has {len(names)} classes (0 to {len(names) - 1})"
    problems = [
        Problem(find_label_file(image_files[i]), int(table.rows[j]), f"class {table.classes[j]}, {known}", True, WRONG_CLASS)
        for i, j in zip(images, bad[first])
    ]
    return np.isin(np.arange(len(table)), images), problems


def summarise(table: LabelTable, *, prefix: str = "", shown: int = 20, whole_images: bool = False) -> str:
    """Counts of images and objects (of images alone, where each has one class), then the problems, one a line (at most ``shown``)."""
    skipped = len({p.path for p in table.problems if p.skips})
    background = int(((table.counts == 0) & table.usable).sum())
    counts = f"{int(table.usable.sum())} images"
    counts += "" if whole_images else f", {len(table.classes)} objects, {background} images without objects"
    lines = [f"{prefix}{counts}, {skipped} images left out"]
    lines += [f"  {p.line()}" for p in table.problems[:shown]]
    if len(table.problems) > shown:
        lines.append(f"  … and {len(table.problems) - shown} more problems")
    return "\n".join(lines)
