"""glibc's allocator keeps what a network frees: the maps of the next image or step take it again, without new pages from the kernel."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>
SETTINGS = (
    (M_MMAP_MAX, 0),  # blocks that are mapped and unmapped one by one: none, of whatever size
    (M_TRIM_THRESHOLD, -1),  # free bytes at the end of the heap from which it shrinks: never
)


def tune_allocator() -> bool:
    """Lets this process keep its freed memory; returns whether that was possible and wanted.

    By default glibc gives freed blocks of some MiB back to the kernel, which clears every page before it is used again: at 640 px one image
    through a small network costs thousands of page faults, and a training step hundreds of thousands. The peak is hardly higher so, but the
    process stays at it. Settings in the environment win, and other systems stay as they are.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in SETTINGS)
