"""Pascal VOC XML to YOLO label files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data.images.reading import is_image
from data.labels.problems import MISSING, Problem
from data.labels.tree import walk_tree
from data.labels.voc import VocFile, read_voc, voc_files
from data.tools.writing import Converted, names_of, print_image_folders, print_written, write_yolo_dataset


def voc_to_yolo(
    annotations: Path, out: Path, *, images: Path | None = None, names: Sequence[str] = (), split: str = "train", one_based: bool = False,
    difficult: bool = False, exist_ok: bool = False,
) -> list[Problem]:  # fmt: skip
    """Writes a label file for every XML of a folder, named after the XML and its sub-folder, and ``data.yaml``.

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
        UserError: no XML file, a file that would be written twice, exists already or cannot be written, or no object at all.
    """
    files = voc_files(annotations)
    read = [read_voc(path, one_based=one_based, difficult=difficult) for path in files]
    names = tuple(names) or names_of(read, annotations)
    folder = annotations if annotations.is_dir() else annotations.parent
    index = None if images is None else ImageIndex(images)
    converted, problems = [], [p for f in read for p in f.problems]
    for found in read:
        labels = None if any(p.skips for p in found.problems) else found.numbered(names)
        problems += labels.problems if labels else ()
        if labels is None or not labels.is_usable:
            continue
        own = found.path.relative_to(folder).with_suffix("").as_posix()  # a dot in it is no suffix: 2021-01-26_18.14.01
        image = index.find(own, found.image_name) if index else None
        if index and image is None:
            problems.append(Problem(str(index.folder / found.image_name), 0, "no such file", False, MISSING))
        suffix = image.suffix if image else ".jpg"
        converted.append(Converted(f"{split}/{own}{suffix}", labels, str(found.path), image))
    written = write_yolo_dataset(out, converted, names, exist_ok=exist_ok)
    print_written(written, read)
    _print_renamed(read, have_images=images is not None)
    print_image_folders(out, [split], have_images=images is not None)
    return problems


class ImageIndex:
    """The images below a folder, found by an XML's own name and sub-folder, else by the name that it gives.

    Args:
        folder: of the images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_name: dict[str, str] = {}  # relative path: itself, and the first one without its suffix
        self._by_base: dict[str, list[str]] = {}  # name with and without suffix: relative paths
        for top, names, _ in walk_tree(folder):
            for name in filter(is_image, names):
                path = Path(os.path.relpath(os.path.join(top, name), folder))
                for key in (path, path.with_suffix("")):
                    self._by_name.setdefault(key.as_posix(), path.as_posix())
                    self._by_base.setdefault(key.name, []).append(path.as_posix())

    def find(self, own: str, given: str) -> Path | None:
        """The image of an XML, None where there is none, or where images of several folders could be meant.

        Args:
            own: path of the XML below its folder, without suffix.
            given: name of the image in it.
        """
        stem, bare = PurePosixPath(own).name, PurePosixPath(given).stem
        folder = own[: len(own) - len(stem)]
        names = [f"{stem}{PurePosixPath(given).suffix}", stem, given, bare]  # the suffix decides between a.jpg and a.png
        keys = [f"{place}{name}" for place in dict.fromkeys((folder, "")) for name in names]
        found = next((self._by_name[key] for key in keys if key in self._by_name), None)
        if found is None:
            alone = (self._by_base.get(name, []) for name in names)
            found = next((paths[0] for paths in alone if len(paths) == 1), None)
        return self.folder / found if found else None


def _print_renamed(read: Sequence[VocFile], *, have_images: bool) -> None:
    """Says how many XML files name another image than their own, where no images were given to decide which is meant."""
    other = [f for f in read if f.path.stem not in (f.image_name, PurePosixPath(f.image_name).stem)]
    if other and not have_images:
        count, first = f"{len(other)} of {len(read)} XML files", f"{other[0].path} names {other[0].image_name}"
        print(f"{count} name another image than their own name says, first: {first}; label files are named after the XML")
