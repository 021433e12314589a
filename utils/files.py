"""Atomic writes: a file is complete or absent, whatever happens while it is written."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
