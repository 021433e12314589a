"""Memory of maps on a CPU: glibc's allocator keeps what a network frees, and what is too large for that comes in huge pages.

Either way the maps of the next image cost few page faults.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGEST_BLOCK = 32 << 20  # bytes, the most that glibc takes: larger blocks are mapped and unmapped as before
KEPT = 512 << 20  # bytes at the end of the heap that are not given back
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch asks for huge pages for its larger tensors where this is 1


def tune_allocator() -> bool:
    """Sets both thresholds for this process, and torch's huge pages; returns whether the thresholds were set.

    By default glibc gives freed blocks of some MiB back to the kernel, which clears every page before it is used again: at 640 px one image
    through a small network costs thousands of page faults. A batch's maps are larger than what glibc keeps; in pages of 2 MiB they cost
    few faults too. Settings in the environment win, and other systems stay as they are. Torch reads its own when it makes its first tensor.
    """
    if sys.platform != "linux":
        return False
    os.environ.setdefault(HUGE_PAGES, "1")
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((M_MMAP_THRESHOLD, LARGEST_BLOCK), (M_TRIM_THRESHOLD, KEPT))
    return mallopt is not None and all(mallopt(option, size) == 1 for option, size in settings)
