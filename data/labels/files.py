"""Which images a data set has (folders and .txt lists), and where the label file of each is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from data.images.bands import without_stored_arrays
from data.images.reading import is_image
from utils.errors import UserError


def list_images(sources: Sequence[Path]) -> list[str]:
    """All image files of the sources (folders with everything below them, .txt lists, single images), sorted within each.

    Raises:
        UserError: nothing found.
    """
    found: list[str] = []
    for source in sources:
        if source.is_dir():
            tree = os.walk(source, followlinks=True)  # folders that are named like images are listed too, and reported as unusable
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


def has_label_files(image_files: Sequence[str]) -> bool:
    """Whether any of the images has a label file. Folders are listed, which is faster than a look-up of every file."""
    expected: set[str] = set()
    for folder in dict.fromkeys(os.path.dirname(label_path(f)) for f in image_files):
        try:
            with os.scandir(folder) as entries:
                texts = [e.path for e in entries if e.name.endswith(".txt")]
        except OSError:
            continue
        expected = expected or {label_path(f) for f in image_files} if texts else expected
        if not expected.isdisjoint(texts):
            return True
    return False
