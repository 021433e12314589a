"""Pascal VOC XML to YOLO label files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from data.images.reading import IMAGE_SUFFIXES
from data.labels.problems import MISSING, Problem
from data.labels.voc import VocFile, read_voc, voc_files
from data.tools.writing import print_image_folders, write_yolo_dataset
from utils.errors import UserError


def voc_to_yolo(
    annotations: Path, out: Path, *, images: Path | None = None, names: Sequence[str] = (), split: str = "train", one_based: bool = False,
    difficult: bool = False, exist_ok: bool = False,
) -> list[Problem]:  # fmt: skip
    """Writes a label file for every XML of a folder, and ``data.yaml``.

    Args:
        annotations: folder of XML files, or one of them.
        out: folder to write.
        images: folder of the images; without it only labels are written.
        names: classes in order; all names that occur, sorted, if not given.
        split: name of the folders written.
        one_based: px count from 1 and the last one is included, as in the original VOC archives; else coordinates are the box's edges.
        difficult: keep objects marked as difficult.
        exist_ok: write over files that are there.

    Returns:
        What was left out.

    Raises:
        UserError: no XML file, one that exists already or cannot be written, or no object at all.
    """
    read = [read_voc(path, one_based=one_based, difficult=difficult) for path in voc_files(annotations)]
    names = tuple(names) or _all_names(read, annotations)
    found = {f.image_name: f.numbered(names) for f in read if not any(p.skips for p in f.problems)}
    problems = [p for f in read for p in f.problems] + [p for f in found.values() for p in f.problems]
    found = {name: f for name, f in found.items() if f.is_usable}
    sources: dict[str, Path] = {}
    if images is not None:
        sources, absent = _find_images(images, found, split)
        problems += absent
    keys = {Path(key).stem: key for key in sources}
    labels = {keys.get(Path(name).stem, f"{split}/{name}"): f for name, f in found.items()}
    write_yolo_dataset(out, labels, names, sources, exist_ok=exist_ok)
    skipped = sum(f.difficult for f in read)
    print(f"{len(labels)} images, {sum(len(f.classes) for f in labels.values())} objects of {len(names)} classes in {out / 'data.yaml'}"
          + (f"; {skipped} difficult objects left out (--difficult keeps them)" if skipped else ""))  # fmt: skip
    print_image_folders(out, [split], have_images=images is not None)
    return problems


def _all_names(read: Sequence[VocFile], annotations: Path) -> tuple[str, ...]:
    """All class names that occur, sorted."""
    names = tuple(sorted({label for f in read for label in f.labels}))
    if not names:
        first = next((f", first: {f.problems[0]}" for f in read if f.problems), "")
        raise UserError(f"{annotations}: no object in {len(read)} files{first}")
    return names


def _find_images(folder: Path, names: Iterable[str], split: str) -> tuple[dict[str, Path], list[Problem]]:
    """The images by ``split/name``, and a problem for each that is missing."""
    found: dict[str, Path] = {}
    absent: list[Problem] = []
    for name in names:
        source = _find_image(folder, name)
        if source is None:
            absent.append(Problem(str(folder / name), 0, "no such file", False, MISSING))
        else:
            found[f"{split}/{Path(name).stem}{source.suffix}"] = source
    return found, absent


def _find_image(folder: Path, name: str) -> Path | None:
    """The image of an XML: by the name that it gives, else by its stem with any image suffix."""
    if (folder / name).is_file():
        return folder / name
    guesses = ((folder / name).with_suffix(s) for suffix in sorted(IMAGE_SUFFIXES) for s in (suffix, suffix.upper()))
    return next((p for p in guesses if p.is_file()), None)
