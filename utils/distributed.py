"""The only place that reads RANK and WORLD_SIZE: which process this is, and sums over all of them. Alone, everything is a no-op."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import UserError


def rank() -> int:
    """Number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process prints and saves."""
    return rank() == 0


def is_distributed() -> bool:
    """Whether a process group has been joined."""
    return dist.is_available() and dist.is_initialized()


def select_device(name: str = "") -> torch.device:
    """The device of this process: ``""`` takes a GPU where there is one; ``cpu``, ``mps``, ``0``, ``cuda:0`` are understood.

    ``0,1`` names several GPUs; each process takes the one of its local rank, so it needs as many processes (torchrun).

    Raises:
        UserError: no such device here.
    """
    name = name.strip().lower().removeprefix("cuda:") if name else ""
    if name in ("cpu", "mps"):
        if name == "mps" and not torch.backends.mps.is_available():
            raise UserError("--device mps: not available here; use --device cpu")
        return torch.device(name)
    if not torch.cuda.is_available():
        if name in ("", "cuda"):
            return torch.device("cpu")
        raise UserError(f"--device {name}: no CUDA device is available here; use --device cpu")
    numbers = [n.strip() for n in name.split(",")] if name and name != "cuda" else [str(i) for i in range(torch.cuda.device_count())]
    if not all(n.isdecimal() and int(n) < torch.cuda.device_count() for n in numbers):
        raise UserError(f"--device {name}: give cpu, mps or GPU numbers below {torch.cuda.device_count()}, such as 0 or 0,1")
    if name and len(numbers) > 1 and world_size() == 1:
        raise UserError(f"--device {name}: several GPUs need as many processes: torchrun --nproc_per_node {len(numbers)} train.py ...")
    if local_rank() >= len(numbers):
        raise UserError(f"--device {name or 'all'}: {len(numbers)} GPU(s) for {world_size()} processes; start no more processes than GPUs")
    return torch.device("cuda", int(numbers[local_rank()]))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the other processes of torchrun, and leaves them whatever happens inside."""
    if world_size() == 1 or is_distributed():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over all processes; the value itself when alone. Not differentiated through."""
    if not is_distributed():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def broadcast_object(value: object) -> object:
    """The main process's value, on every process. For small plain values such as a path or a decision."""
    if not is_distributed():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def barrier() -> None:
    """Waits for all processes."""
    if is_distributed():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in order of rank, on every process. Meant for plain values once in a while, such as metrics."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
