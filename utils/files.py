"""Writes that are atomic (a file is complete or absent, whatever happens while it is written), and reads that are bounded."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError

UNFINISHED = ".*.partial*"  # partial files that a killed process leaves


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; at the end the file replaces ``path``, and after an error it is removed.

    The suffix is that of ``path``, as some writers choose the format by it. Names are unique to the process and thread.

    Raises:
        OSError: the file cannot be renamed.
    """
    start = path.stem[:40]  # a name may have 255 bytes
    partial = path.with_name(f".{start}.{os.getpid()}-{threading.get_ident():x}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


class NotAFileError(OSError):
    """A folder, device, pipe or socket where a regular file is read; ``kind`` says which."""

    def __init__(self, path: str | Path, *, is_folder: bool) -> None:
        super().__init__(None, f"not a file{', but a folder' if is_folder else ''}", str(path))
        self.kind = "a folder" if is_folder else "a device, pipe or socket"


class TooLargeError(OSError):
    """A file that is larger than what is read."""


def read_bounded(path: str | Path, *, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; a pipe or device, which may never end, is not opened.

    Raises:
        OSError: there is none, it cannot be read, is no regular file, or is larger.
    """
    try:
        found = os.stat(path)
    except ValueError as error:  # a null byte in the name
        raise OSError(None, str(error), str(path)) from error
    if not stat.S_ISREG(found.st_mode):
        raise NotAFileError(path, is_folder=stat.S_ISDIR(found.st_mode))
    data = b""
    if found.st_size <= limit:
        with open(path, "rb") as file:
            data = file.read(found.st_size + 1)
            while len(data) <= limit and (more := file.read(2**20)):  # it grows, or says that it is empty as those of /proc do
                data += more
    if max(len(data), found.st_size) > limit:
        raise TooLargeError(None, f"larger than the {limit // 2**20} MiB that are read", str(path))
    return data


def replacement(path: Path, found: Path, *, published: Collection[str]) -> str:
    """What to say where ``found``, a file of this project, is read in place of a path that does not exist; empty for a bare name.

    Args:
        published: folders of published projects, as their pages' commands have them.

    Raises:
        UserError: the path's folder does not exist and is none of those, so that the path is a mistake.
    """
    folder = path.parent
    if folder == Path():
        return ""
    if not folder.is_dir() and folder.as_posix() not in published:
        raise UserError(f"{path}: the folder {folder} does not exist; the bare name {path.name} means {found}")
    return f"{path}: no such file, so {found} is read"
