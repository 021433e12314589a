"""glibc's allocator keeps what a network frees: the maps of the next image take it again, without new pages from the kernel."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGEST_BLOCK = 32 << 20  # bytes, the most that glibc takes: larger blocks are mapped and unmapped as before
KEPT = 512 << 20  # bytes at the end of the heap that are not given back


def keep_freed_memory() -> bool:
    """Sets both thresholds for this process; returns whether that was possible and wanted.

    By default glibc gives freed blocks of some MiB back to the kernel, which clears every page before it is used again: at 640 px one image
    through a small network costs thousands of page faults. Settings in the environment win, and other systems stay as they are.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((M_MMAP_THRESHOLD, LARGEST_BLOCK), (M_TRIM_THRESHOLD, KEPT))
    return mallopt is not None and all(mallopt(option, size) == 1 for option, size in settings)
