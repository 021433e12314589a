"""Memory: recognizing out-of-memory errors, releasing caches, and how many bytes are free."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from utils.cli.allocator import return_freed_memory
from utils.errors import UserError

# Messages of torch, its convolutions, cuDNN, cuBLAS and onnxruntime, in lower case; only some have an exception class of their own.
OUT_OF_MEMORY_TEXTS = (
    ("out of memory", "can't allocate memory", "cannot allocate memory", "failed to allocate memory", "alloc_failed", "bad_alloc")
    + ("bad allocation", "could not create a primitive", "could not create a memory")
)  # fmt: skip
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 2**60  # bytes; version 1 of the control groups writes a number near 2^63 for no limit


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that the memory of the device or of the machine was full."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def release_memory(device: torch.device) -> None:
    """Frees what a failed pass left: reference cycles that hold tensors, and cached blocks of the allocator."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        return_freed_memory()


def free_bytes(device: torch.device) -> int:
    """Bytes that this process could still allocate on the device.

    Raises:
        UserError: the system does not report it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = available_bytes()
    if available is None:
        raise UserError(f"the free memory of this {device.type} is not known here")
    return min(available, *_free_in_cgroups(), UNLIMITED)


def available_bytes() -> int | None:
    """Bytes of the machine's memory that new allocations can have; None where the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def peak_bytes() -> int | None:
    """The most memory that this process ever had in use; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _free_in_cgroups() -> list[int]:
    """Bytes left under the limits of control groups (containers, batch systems), version 1 and 2."""
    pairs = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    free = []
    for limit, used in pairs:
        try:
            most, now = ((CGROUP / name).read_text().strip() for name in (limit, used))
        except OSError:
            continue
        if most.isdecimal() and int(most) < UNLIMITED:
            free.append(max(int(most) - int(now), 0))
    return free
