"""A cleaned copy of a data set: usable images only, each once and in one split. The original is only read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.dataset_spec import DatasetSpec
from data.labels.files import find_label_file
from data.tools.inspection import SplitInspection
from data.tools.writing import dataset_yaml, label_text, place_image, refuse_existing, write_text
from utils.errors import UserError
from utils.masks.outlines import joined


def write_clean_copy(spec: DatasetSpec, found: Sequence[SplitInspection], out: Path, *, exist_ok: bool = False) -> list[str]:
    """Writes images (hard links, or copies where links are not possible), labels and ``data.yaml``; returns a line for each split.

    Left out are unusable images, repeated ones, and those of an earlier split that a later one has too (val keeps what train shares with
    it), and rows that were dropped; coordinates are clipped to the image.

    Raises:
        UserError: a file exists already, belongs to the original, or cannot be written.
    """
    lines, texts, places = [], {}, {}
    taken: set[str] = set()
    for split in found:
        keep = split.usable & ~split.repeats & ~split.leaks
        for i in np.flatnonzero(keep):
            name = _free_name(_relative(split.files[i], spec.sources(split.split)), split.split, taken)
            places[out / "images" / name] = split.files[i]
            if split.table.has_label_file[i]:
                part = slice(split.table.starts[i], split.table.starts[i + 1])
                polygons = [joined(rings) for rings in split.table.instances(int(i), hw=(1, 1)).outlines()]
                text = label_text(split.table.classes[part], split.table.boxes_cxcywh[part], polygons)
                texts[(out / "labels" / name).with_suffix(".txt")] = text
        lines.append(f"{split.split}: {int(keep.sum())} of {len(keep)} images kept")
    more = ({"ch": spec.ch} if spec.ch_given else {}) | ({"bits": spec.bits} if spec.bits else {})
    texts[out / "data.yaml"] = dataset_yaml({s.split: f"images/{s.split}" for s in found}, spec.names, more=more)
    originals = {os.path.realpath(p) for s in found for f in s.files for p in (f, find_label_file(f))} | {os.path.realpath(spec.yaml_path)}
    own = next((p for p in (*texts, *places) if os.path.realpath(p) in originals), None)
    if own is not None:
        raise UserError(f"--out {out}: {own} belongs to the original, which is never changed; give another folder")
    refuse_existing([*texts, *places], exist_ok=exist_ok)
    for target, source in places.items():
        place_image(source, target)
    for path, text in texts.items():
        write_text(path, text)
    return lines


def _relative(file: str, sources: Sequence[Path]) -> str:
    """The name below its source folder; of images from lists, the name alone."""
    folder = next((s for s in sources if s.is_dir() and Path(file).is_relative_to(s)), Path(file).parent)
    return Path(file).relative_to(folder).as_posix()


def _free_name(name: str, split: str, taken: set[str]) -> str:
    """``split/name``, with a number where an image of this name exists (of any suffix: they would share a label file)."""
    path = Path(split) / name
    number = 2
    while path.with_suffix("").as_posix() in taken:
        path = (Path(split) / name).with_stem(f"{Path(name).stem}_{number}")
        number += 1
    taken.add(path.with_suffix("").as_posix())
    return path.as_posix()
