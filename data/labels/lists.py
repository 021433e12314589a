"""Lists of images, one path a line, as people and programs write them: from any folder, on any system, in any encoding of Unicode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data.labels.paths import as_written
from utils.errors import UserError
from utils.files import read_bounded
from utils.reading.limits import MAX_LIST_BYTES
from utils.reading.text_files import marked_encoding

PARENTS = 3  # folders above a list that its entries may be relative to
EXPORT_FOLDER = "data"  # which CVAT writes in front of its entries, and which its archives do not have


def read_list(path: Path) -> list[str]:
    """Image paths from a list, each absolute, or relative to the list's folder, the working directory or the folders above the list.

    That of these folders which has most of the entries is tried first. Backslashes are separators where nothing has the name as it is
    written; so is ``data/`` left out in front.

    Raises:
        UserError: it cannot be read, or is not text.
    """
    entries = [line for line in list_lines(path) if line and not line.startswith("#")]
    folder = as_written(path).parent
    bases = list(dict.fromkeys([folder, Path.cwd(), *list(folder.parents)[:PARENTS]]))
    found: list[list[str]] = []  # by base, the file of each entry; empty where there is none
    for base in bases:
        found.append([_find(base, entry) for entry in entries])
        if all(found[-1]):
            return found[-1]
    order = sorted(range(len(bases)), key=lambda k: -sum(map(bool, found[k])))  # stable
    guess = bases[order[0]]
    return [next((hit for k in order if (hit := found[k][i])), "") or str(as_written(guess / e)) for i, e in enumerate(entries)]


def list_lines(path: Path) -> list[str]:
    """The lines of a list, without blanks at their ends.

    Raises:
        UserError: it cannot be read, or is not text.
    """
    try:
        data = read_bounded(path, limit=MAX_LIST_BYTES)
    except OSError as error:
        raise UserError(f"{path}: the list cannot be read: {error.strerror or error}") from error
    encoding = marked_encoding(data)
    is_wide = encoding.startswith(("utf-16", "utf-32"))  # UTF-8 passes on what is no text, as file names may be
    try:
        text = data.decode(encoding) if is_wide else data.decode("utf-8-sig", errors="surrogateescape")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the list is not valid {encoding.upper()}; save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path}: the list is not text (it has null characters); save it as UTF-8, one path a line")
    return [line.strip() for line in text.splitlines()]


def _find(base: Path, entry: str) -> str:
    """The file of an entry relative to a folder, as written; empty where there is none."""
    for form in _forms(entry):
        if os.path.lexists(os.path.join(base, form)):
            return str(as_written(base / form))
    return ""


def _forms(entry: str) -> Iterator[str]:
    """An entry as it is written, with slashes in place of backslashes, and both without ``data/`` in front."""
    for form in dict.fromkeys((entry, entry.replace("\\", "/"))):
        yield form
        first, slash, rest = form.removeprefix("./").partition("/")
        if slash and first == EXPORT_FOLDER:
            yield rest.lstrip("/")
