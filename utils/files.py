"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".*.partial*"  # what a killed process leaves beside them


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; the file takes the place of what is there at the end, and leaves nothing if there is an error.

    The suffix is that of ``path``, by which a reader knows what it is. Processes and threads do not get in each other's way.

    Raises:
        OSError: it cannot be put in place.
    """
    start = path.stem[:40]  # a name may have 255 bytes
    partial = path.with_name(f".{start}.{os.getpid()}-{threading.get_ident():x}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
