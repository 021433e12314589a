"""Which images a data set has (folders and .txt lists), and where the label file of each is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.images.bands import without_stored_arrays
from data.images.reading import is_image
from data.labels.lists import read_list
from data.labels.paths import as_written
from data.labels.tree import walk_tree
from utils.errors import UserError

IMAGES = "/images/"


def list_images(sources: Sequence[Path]) -> list[str]:
    """All image files of the sources (folders with everything below them, .txt lists, single images), sorted within each.

    Raises:
        UserError: nothing found, or a list that cannot be read.
    """
    found: list[str] = []
    for source in sources:
        if source.is_dir():
            tree = walk_tree(source)  # folders that are named like images are listed too, and reported as unusable
            names = (os.path.join(top, name) for top, files, folders in tree for name in (*files, *folders) if is_image(name))
            found += without_stored_arrays(sorted(names))
        elif source.suffix == ".txt":
            found += read_list(source)
        else:
            found.append(str(source))
    found = list(dict.fromkeys(found))
    if not found:
        raise UserError(f"no images in {', '.join(map(str, sources))}; a folder of images or a .txt list of their paths is expected")
    return found


def label_path(image_path: str) -> str:
    """The label file of an image by the rule: the last ``/images/`` becomes ``/labels/``, the suffix ``.txt``; else it lies beside it.

    The path counts as it is written, without its dots: links in it are not followed.
    """
    path = image_path.replace(os.sep, "/")
    if "/../" in path or "/./" in path:
        path = as_written(image_path).as_posix()
    head, slash, name = f"/{path}".rpartition(IMAGES)  # a relative path may begin with images/
    return _text_beside(f"{head}/labels/{name}"[1:] if slash else path)


def find_label_file(image_path: str) -> str:
    """The label file of an image: by the rule; else beside the image, where one is only there."""
    path = label_path(image_path)
    if not os.path.lexists(path):
        beside = _text_beside(image_path)
        if beside != path and os.path.lexists(beside):
            return beside
    return path


def find_label_files(image_files: Sequence[str]) -> list[str]:
    """``find_label_file`` of each image. Folders are listed, which is faster than a look-up of every file."""
    by_rule = [label_path(f) for f in image_files]
    present = _texts_of(os.path.dirname(path) for path in by_rule)
    missing = [i for i, path in enumerate(by_rule) if path not in present]
    beside = {i: _text_beside(image_files[i]) for i in missing}
    present = _texts_of(os.path.dirname(path) for path in beside.values())
    return [beside[i] if i in beside and beside[i] in present else path for i, path in enumerate(by_rule)]


def has_label_files(image_files: Sequence[str]) -> bool:
    """Whether any of the images has a label file."""
    found = find_label_files(image_files)
    return not _texts_of(os.path.dirname(path) for path in found).isdisjoint(found)


def _text_beside(image_path: str) -> str:
    return os.path.splitext(str(Path(image_path)))[0] + ".txt"


def _texts_of(folders: Iterable[str]) -> set[str]:
    """All .txt files of some folders."""
    found: set[str] = set()
    for folder in dict.fromkeys(folders):
        try:
            with os.scandir(folder or ".") as entries:
                found.update(os.path.join(folder, e.name) for e in entries if e.name.endswith(".txt"))
        except (OSError, ValueError):
            continue
    return found
