"""Memory that is full: how to know it from other errors, how to give back what can be given, and what is left at all."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from utils.errors import UserError

# How torch, its convolutions, cuDNN, cuBLAS and onnxruntime say it; only some of it has a class of its own. In lower case.
SIGNS = (
    ("out of memory", "can't allocate memory", "cannot allocate memory", "failed to allocate memory", "alloc_failed", "bad_alloc")
    + ("bad allocation", "could not create a primitive", "could not create a memory")
)  # fmt: skip
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 2**60  # bytes; version 1 of the control groups writes a number near 2^63 for none


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that there was no memory left, of the device or of the machine."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or any(sign in text for sign in SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def release_memory(device: torch.device) -> None:
    """What a failed pass left: cycles that hold tensors, and blocks that the allocator keeps in pieces."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Bytes that a training could still take on the device.

    Raises:
        UserError: the system does not say.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _meminfo()
    if available is None:
        raise UserError(f"the free memory of this {device.type} is not known here")
    return min(available, *_left_in_groups(), UNLIMITED)


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _left_in_groups() -> list[int]:
    """What control groups (containers, batch systems) leave; both versions of their files."""
    pairs = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    left = []
    for limit, used in pairs:
        try:
            most, now = ((CGROUP / name).read_text().strip() for name in (limit, used))
        except OSError:
            continue
        if most.isdecimal() and int(most) < UNLIMITED:
            left.append(max(int(most) - int(now), 0))
    return left
