"""DOTA's text labels to YOLO label files of four corners."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.labels.dota import dota_files, read_dota
from data.labels.probing import probe_labels
from data.labels.problems import MISSING, Problem
from data.tools.voc_to_yolo import ImageIndex
from data.tools.writing import Converted, names_of, print_written, write_yolo_dataset


def dota_to_yolo(
    annotations: Path, out: Path, *, images: Path, names: Sequence[str] = (), split: str = "train", difficult: bool = False,
    exist_ok: bool = False,
) -> list[Problem]:  # fmt: skip
    """Writes a label file for every text file of a folder, and ``data.yaml``; images are linked or copied.

    Args:
        annotations: folder of DOTA's label files (``labelTxt``), or one of them.
        out: folder to write.
        images: folder of the images, whose sizes the corners are divided by.
        names: classes in order; all names that occur, sorted, if not given.
        split: name of the folders written.
        difficult: keep objects marked as difficult.
        exist_ok: write over files that are there.

    Returns:
        What was left out.

    Raises:
        UserError: no label file, a file that would be written twice, exists already or cannot be written, or no object at all.
    """
    read = [read_dota(path, difficult=difficult) for path in dota_files(annotations)]
    names = tuple(names) or names_of(read, annotations)
    folder = annotations if annotations.is_dir() else annotations.parent
    index, converted, problems = ImageIndex(images), [], []
    for found in read:
        own = found.path.relative_to(folder).with_suffix("").as_posix()
        image = index.find(own, f"{found.path.stem}.png")
        if image is None:
            problems.append(Problem(str(found.path), 0, f"no image of this name in {images}", True, MISSING))
            continue
        probed = probe_labels(str(image))
        labels = found.numbered(names, probed.hw) if probed.is_usable else probed
        problems += labels.problems
        if labels.is_usable:
            converted.append(Converted(f"{split}/{own}{image.suffix}", labels, str(found.path), image))
    written = write_yolo_dataset(out, converted, names, segments=True, exist_ok=exist_ok)
    print_written(written, read)
    return problems
