"""glibc's allocator keeps what a network frees: the maps of the next image or step take it again, without new pages from the kernel."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of <malloc.h>
KEEP_ALL = (
    (M_MMAP_MAX, 0),  # blocks that are mapped and unmapped one by one: none, of whatever size
    (M_TRIM_THRESHOLD, -1),  # free bytes at the end of the heap from which it shrinks: never
)
KEEP_SOME = (
    (M_MMAP_MAX, 1 << 16),
    (M_MMAP_THRESHOLD, 32 << 20),  # bytes, the most that glibc takes: larger blocks are mapped and unmapped
    (M_TRIM_THRESHOLD, 512 << 20),
)
_keeps = False  # whether this process does, or the one that it was forked from


def keep_freed_memory() -> bool:
    """Lets this process keep all its freed memory; returns whether that was possible and wanted.

    By default glibc gives freed blocks of some MiB back to the kernel, which clears every page before it is used again: at 640 px one image
    through a small network costs thousands of page faults, and a training step hundreds of thousands. The process stays at its peak, and
    where sizes vary it may keep more than is in use at once; :func:`return_freed_memory` gives back what is free. Settings in the
    environment win, and other systems stay as they are.
    """
    global _keeps
    if sys.platform != "linux" or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    _keeps = _set(KEEP_ALL)
    return _keeps


def keep_less_freed_memory() -> None:
    """In a process forked from one that keeps all: one of many, whose peaks would add up. It keeps some, and no large block."""
    if _keeps:
        _set(KEEP_SOME)


def return_freed_memory() -> None:
    """Gives freed memory back to the kernel, where this process keeps it."""
    if _keeps:
        ctypes.CDLL(None).malloc_trim(0)


def _set(settings: tuple[tuple[int, int], ...]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in settings)
