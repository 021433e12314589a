"""Everything below a folder, through links too, without ever going round in a circle."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

Identity = tuple[int, int]  # device and inode of a folder


class Folder(NamedTuple):
    """A folder of a tree: its path by the names in it, and the names of what it holds."""

    path: str
    files: list[str]
    folders: list[str]  # links to folders too


def walk_tree(top: str | Path) -> Iterator[Folder]:
    """The folder and all below it, each once: a folder that a link leads to a second time, or that holds ``top``, is not entered.

    Folders come before those that only links lead to, so a folder has its own name rather than a link's. What cannot be read is empty.
    """
    visited = _enclosing(os.path.realpath(top))
    waiting, linked = deque([str(top)]), deque[str]()
    while waiting or linked:
        path = waiting.popleft() if waiting else linked.popleft()
        identity = _identity(path)
        if identity is None or identity in visited:
            continue
        visited.add(identity)
        folder, links = _list_folder(path)
        waiting += [os.path.join(path, name) for name in folder.folders if name not in links]
        linked += [os.path.join(path, name) for name in folder.folders if name in links]
        yield folder


def _enclosing(real: str) -> set[Identity]:
    """The folders that hold a folder: a link to one of them would list it again, and the whole disk with it."""
    above = [_identity(folder) for folder in Path(real).parents]
    return {identity for identity in above if identity is not None}


def _identity(path: str | Path) -> Identity | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _list_folder(path: str) -> tuple[Folder, set[str]]:
    """What a folder holds, sorted, and which of its folders are links."""
    files, folders, links = [], [], set()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not _is_folder(entry):
                    files.append(entry.name)
                    continue
                folders.append(entry.name)
                if entry.is_symlink():
                    links.add(entry.name)
    except OSError:
        pass
    return Folder(path, sorted(files), sorted(folders)), links


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # such as a link to itself
