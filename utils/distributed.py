"""The only place that reads RANK and WORLD_SIZE: which process this is, and sums over all of them. Alone, everything is a no-op.

``watch_ranks`` brings the processes of torchrun together, sees to it that all end when one does, and that one of them says why;
``process_group`` inside it is what tensors are summed over, NCCL between GPUs and Gloo between CPUs.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import UserError
from utils.watchdog import CONNECT_S, Watchdog

TIMEOUT = timedelta(minutes=30)  # of a collective: the longest that processes may wait for the slowest; a dead one is noticed at once
MEETING = timedelta(minutes=10)  # until all processes are there
NOTICE_S = 8  # between a failed collective and the news why: loader processes hold a dead one's connections for up to 5 s
POLL_S = 0.05
LINGER_S = 3  # that the main process stays after a failure, for the others to end in order


class _RankWatch:
    """What the processes share beside the process group."""

    def __init__(self, store: dist.Store, watchdog: Watchdog) -> None:
        self.store, self.watchdog = store, watchdog
        self.count = itertools.count()  # of what was agreed on, the same on all

    def key(self) -> str:
        return f"agreed/{next(self.count)}"

    def wait_for(self, key: str) -> None:
        """Without end: the watchdog ends the waiting when the process that is waited for dies."""
        while not self.store.check([key]):
            if self.watchdog.news is not None:
                raise _Told
            time.sleep(POLL_S)

    def any(self, mine: bool) -> bool:
        """Whether it holds for one of the processes."""
        key = self.key()
        self.store.set(f"{key}/{rank()}", str(mine))
        for other in range(world_size()):
            self.wait_for(f"{key}/{other}")
        return any(self.store.get(f"{key}/{other}") == b"True" for other in range(world_size()))

    def is_first(self) -> bool:
        """Whether no other process has had something to say before."""
        if self.watchdog.wait(2 * POLL_S):
            return False
        try:
            return self.store.add("speakers", 1) == 1
        except RuntimeError:  # whoever kept the store has gone, and spoken
            return False


class _Told(RuntimeError):
    """Another process has ended."""


_watch: _RankWatch | None = None


def rank() -> int:
    """Number of this process among all, from 0."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Number of this process on this machine, from 0."""
    return _number("LOCAL_RANK", 0)


def world_size() -> int:
    """Number of processes."""
    return _number("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Number of processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", world_size())


def restarted() -> bool:
    """Whether torchrun (``--max-restarts``) or SLURM (a requeued job) has started this job again; each torchrun counts its own."""
    count = _number("TORCHELASTIC_RESTART_COUNT", 0) + _number("SLURM_RESTART_COUNT", 0)
    return count > 0 if _watch is None else _watch.any(count > 0)


def job_id() -> str:
    """What tells this job from others and stays the same when it is restarted; empty where nobody restarts it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"slurm {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    given = os.environ["TORCHELASTIC_RUN_ID"]
    if "SLURM_JOB_ID" in os.environ:
        return f"slurm {os.environ['SLURM_JOB_ID']} {given}"
    return given if given not in ("", "none") else f"{socket.gethostname()} {os.getppid()}"


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
def watch_ranks() -> Iterator[None]:
    """Meets the other processes of torchrun. Only the main one prints; when one ends early all do, and one of them says why.

    Raises:
        UserError: the environment is incomplete, another process was lost, or what was raised inside.
        SystemExit: another process says why all end.
    """
    global _watch
    if world_size() == 1 or _watch is not None:
        yield
        return
    with _quiet():
        _watch = _meet()
        word = "failed"
        try:
            yield
            word = "bye"
        except KeyboardInterrupt:
            word = "stopped"
            if not _watch.is_first():
                raise SystemExit(130) from None
            raise
        except UserError:
            news = _watch.watchdog.news
            if _watch.watchdog.speaks() if news and news.kind == "lost" else _watch.is_first():
                raise
            raise SystemExit(1) from None
        except RuntimeError as error:
            _end_with_others(error)
        finally:
            _watch.watchdog.close(word, linger_s=LINGER_S if is_main() and word != "bye" else 0)  # it may keep the store
            _watch = None


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the other processes to sum tensors on ``device``, and leaves them whatever happens inside."""
    if _watch is None or is_distributed():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", _watch.store),
        rank=rank(),
        world_size=world_size(),
        timeout=TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def lost_rank_message() -> str:
    """What a failed collective was due to: a sentence if another process was lost, else empty. Waits some seconds for the news."""
    news = _watch.watchdog.wait(NOTICE_S) if _watch else None
    return _watch.watchdog.text() if _watch and news and news.kind == "lost" else ""


def main_rank_decision(decide: Callable[[], str]) -> str:
    """What the main process decides, on every process. Needs no process group."""
    if _watch is None:
        return decide()
    key = _watch.key()
    if is_main():
        _watch.store.set(key, "=" + decide())
    else:
        _watch.wait_for(key)
    return _watch.store.get(key).decode()[1:]


@contextmanager
def local_main_first() -> Iterator[None]:
    """The first process of each machine goes through alone, then the others: it leaves caches that they find. Waits without limit."""
    if _watch is None:
        yield
        return
    key = f"{_watch.key()}/{rank() - local_rank()}"
    if local_rank():
        _watch.wait_for(key)
    yield
    if not local_rank():
        _watch.store.set(key, "done")


def gradient_sync(network: nn.Module, *, now: bool) -> AbstractContextManager[Any]:
    """Around forward and backward: ``now`` decides whether gradients are averaged over processes, or only added up for a later step."""
    return nullcontext() if now or not isinstance(network, nn.parallel.DistributedDataParallel) else network.no_sync()


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> None:
    """Turns batch norms, in place, into ones whose statistics are of the images of all processes (``--sync-bn``); says so where it cannot.

    Kinds of batch norm with a rule of their own stay as they are.

    Raises:
        UserError: processes on CPUs, for which torch has no such batch norm.
    """
    if world_size() == 1:
        print("--sync-bn: one process, so its batch statistics are those of all images anyway")
        return
    if device.type != "cuda":
        raise UserError(f"--sync-bn: torch synchronises batch norms between GPUs only, this is {device.type}; leave it out")
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in plain:
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Gives the tensors the main process's values."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


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


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "").strip()
    if value and not value.isdecimal():
        raise UserError(f"{name}={value} in the environment: a number is needed; start several processes with torchrun")
    return int(value) if value else default


@contextmanager
def _quiet() -> Iterator[None]:
    """Processes other than the main one print nothing; errors and warnings go their own way."""
    if is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _meet() -> _RankWatch:
    """Waits for all processes."""
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE={world_size()} but no {', '.join(missing)} in the environment: start several processes with torchrun")
    try:
        store = next(dist.rendezvous("env://", timeout=MEETING))[0]
        watchdog = Watchdog(store, rank(), world_size(), host=os.environ["MASTER_ADDR"], name=Path(sys.argv[0]).name)
    except (RuntimeError, OSError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the {world_size()} processes do not meet at {place} ({' '.join(str(error).split())[:200]})") from error
    absent = watchdog.absent(CONNECT_S) if is_main() else []
    if absent:
        watchdog.close("failed")
        raise UserError(f"process(es) {', '.join(map(str, absent))} of {world_size()} cannot reach the main one, or have ended")
    return _RankWatch(dist.PrefixStore(watchdog.token, store), watchdog)  # the store may outlive a restart, and what stands in it


def _end_with_others(error: RuntimeError) -> NoReturn:
    """What a failed collective was due to, if another process has ended; else the error itself."""
    assert _watch is not None
    watchdog = _watch.watchdog
    news = watchdog.wait(NOTICE_S)
    if news is None:
        raise error
    if watchdog.speaks():
        raise UserError(watchdog.text()) from error
    raise SystemExit(1) from None
