"""Atomic writes: a file is complete or absent, whatever happens while it is written."""

from __future__ import annotations

import contextlib
import os
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
