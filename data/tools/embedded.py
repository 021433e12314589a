"""Data sets that are drawn on first use: into a temporary folder, which gets its name when it is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

VERSION_FILE = "version.txt"


def ensure_drawn(folder: Path, draw: Callable[[Path], None], *, version: int) -> Path:
    """Draws a data set into ``folder`` unless it is there in this version.

    Args:
        draw: writes the files below the folder that it is given.
        version: of what is drawn; a folder of another one is drawn again.

    Raises:
        OSError: the folder cannot be written.
    """
    version_file = folder / VERSION_FILE
    if _is_drawn(version_file, version):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        draw(temporary)
        (temporary / VERSION_FILE).write_text(f"{version}\n")
        os.chmod(temporary, 0o755)
        if folder.exists() and not _is_drawn(version_file, version):
            shutil.rmtree(folder)
        try:
            temporary.rename(folder)
        except OSError:
            if not version_file.is_file():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_drawn(version_file: Path, version: int) -> bool:
    return version_file.is_file() and version_file.read_text().strip() == str(version)
