"""A summary of the labels before a training, from what the loaders have read already: no file is opened."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.labels.table import LabelTable
from data.tools.inspection import SIZES, size_counts

SHOWN = 5
Split = tuple[Sequence[str], LabelTable]  # images and their labels


def summarize_labels(train: Split, val: Split, names: Sequence[str]) -> list[str]:
    """A line about the boxes, and one for each thing that is likely a mistake: classes without objects, images in both splits."""
    (train_files, train_table), (val_files, val_table) = train, val
    areas = train_table.box_sizes_px().prod(1)
    counts = size_counts(areas)
    total = max(len(areas), 1)
    parts = ", ".join(f"{counts[size] / total:.0%} {size}" for size in SIZES)
    lines = [f"data      {len(areas)} objects of {len(names)} classes to train on: {parts} (COCO's areas, in the original images)"]
    trained, validated = (np.bincount(t.classes, minlength=len(names)) > 0 for t in (train_table, val_table))
    if not trained.all():
        lines.append(f"warning: no object to train on for {_join_names(names, ~trained)}")
    if (validated & ~trained).any():
        lines.append(f"warning: val has objects of classes that are never trained: {_join_names(names, validated & ~trained)}")
    shared = sorted(set(train_files) & set(val_files))
    if shared:
        lines.append(f"warning: {len(shared)} images are in both train and val, first: {shared[0]}")
    return lines


def _join_names(names: Sequence[str], which: np.ndarray) -> str:
    chosen = [names[i] for i in np.flatnonzero(which).tolist()]
    more = f" and {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else ""
    return ", ".join(chosen[:SHOWN]) + more
