"""A summary of the labels before a training, from what the loaders have read already: no file is opened."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.labels.table import LabelTable
from data.tools.inspection import SIZES, size_counts

SHOWN = 5
Split = tuple[Sequence[str], LabelTable]  # images and their labels


def summarize_labels(train: Split, val: Split, names: Sequence[str], *, whole_images: bool = False) -> list[str]:
    """A line about the boxes, or the classes of whole images, and one for each thing that is likely a mistake: classes without objects,
    images in both splits."""
    (train_files, train_table), (val_files, val_table) = train, val
    lines = [_class_line(train_table, names) if whole_images else _box_line(train_table, names)]
    what = "image" if whole_images else "object"
    trained, validated = (np.bincount(t.classes, minlength=len(names)) > 0 for t in (train_table, val_table))
    if not trained.all():
        lines.append(f"warning: no {what} to train on for {_join_names(names, ~trained)}")
    if (validated & ~trained).any():
        lines.append(f"warning: val has {what}s of classes that are never trained: {_join_names(names, validated & ~trained)}")
    shared = sorted(set(train_files) & set(val_files))
    if shared:
        lines.append(f"warning: {len(shared)} images are in both train and val, first: {shared[0]}")
    return lines


def _box_line(table: LabelTable, names: Sequence[str]) -> str:
    areas = table.box_sizes_px().prod(1)
    counts, total = size_counts(areas), max(len(areas), 1)
    parts = ", ".join(f"{counts[size] / total:.0%} {size}" for size in SIZES)
    return f"data      {len(areas)} objects of {len(names)} classes to train on: {parts} (COCO's areas, in the original images)"


def _class_line(table: LabelTable, names: Sequence[str]) -> str:
    counts = np.bincount(table.classes, minlength=len(names))
    few, many = int(counts.min()), int(counts.max())
    span = f"{few}" if few == many else f"{few} ({names[int(counts.argmin())]}) to {many} ({names[int(counts.argmax())]})"
    return f"data      {len(table.classes)} images of {len(names)} classes to train on: {span} of a class"


def _join_names(names: Sequence[str], which: np.ndarray) -> str:
    chosen = [names[i] for i in np.flatnonzero(which).tolist()]
    more = f" and {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else ""
    return ", ".join(chosen[:SHOWN]) + more
