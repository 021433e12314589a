"""The only place that reads RANK and WORLD_SIZE: which process this is, and collectives over all of them. With one process all are no-ops.

``watch_ranks`` connects the processes of torchrun, ends all of them when one does, and lets one of them print why (``utils.watchdog``).
Inside it ``process_group`` is what tensors are reduced over: NCCL between GPUs, Gloo between CPUs.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import UserError
from utils.watchdog import CONNECT_S, Watchdog

Value = TypeVar("Value")
TIMEOUT = timedelta(minutes=30)  # of a collective: the longest that ranks may wait for the slowest; the watchdog finds a dead one sooner
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # until all processes have started
NOTICE_S = 8  # between a failed collective and the watchdog's notice: loader processes keep a dead rank's connections for up to 5 s
POLL_S = 0.05
SIGNAL_NOTICE_S = 1  # between an agent's signal, which follows a lost rank, and the watchdog's notice
LINGER_S = 3  # that the main rank stays after a failure, so that the others can end in order


class _RankWatch:
    """What the ranks share beside the process group: a key-value store and the watchdog."""

    def __init__(self, store: dist.Store, watchdog: Watchdog) -> None:
        self.store, self.watchdog = store, watchdog
        self._calls = itertools.count()  # the same on all ranks, as all make the same calls in the same order

    def new_key(self) -> str:
        """A key for the next exchange, the same on all ranks."""
        return f"exchange/{next(self._calls)}"

    def wait_for(self, key: str) -> None:
        """Waits without limit until the key is set.

        Raises:
            _RankEndedError: another rank has ended, so that the key may never be set.
        """
        while not self.store.check([key]):
            if self.watchdog.ended is not None:
                raise _RankEndedError
            time.sleep(POLL_S)

    def any_rank(self, value: bool) -> bool:
        """Whether ``value`` is true on one of the ranks."""
        key = self.new_key()
        self.store.set(f"{key}/{rank()}", str(value))
        for other in range(world_size()):
            self.wait_for(f"{key}/{other}")
        return any(self.store.get(f"{key}/{other}") == b"True" for other in range(world_size()))

    def claim_report(self) -> bool:
        """Whether this rank is the first that has an error to print; the others stay silent."""
        if self.watchdog.wait(2 * POLL_S):
            return False
        try:
            return self.store.add("reports", 1) == 1
        except RuntimeError:  # the rank that kept the store has ended, and printed its error
            return False


class _RankEndedError(RuntimeError):
    """Another rank has ended."""


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
    return count > 0 if _watch is None else _watch.any_rank(count > 0)


def job_id() -> str:
    """Identifies this job and stays the same when it is restarted; empty where neither torchrun nor SLURM started it."""
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
    given, name = name, name.strip().lower().removeprefix("cuda:") if name else ""
    if not re.fullmatch(r"cpu|mps|cuda|[0-9]{1,3}(\s*,\s*[0-9]{1,3})*|", name):
        raise UserError(f"--device {given[:80]}: cpu, mps, a GPU's number such as 0, or several for as many processes (0,1) are allowed")
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


def make_current(device: torch.device) -> None:
    """Makes a GPU the current one of this process: calls that name no device, such as those for its memory, mean it then."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextmanager
def watch_ranks() -> Iterator[None]:
    """Connects to the other ranks. Only the main rank prints; when one rank ends early all do, and one of them prints why.

    Raises:
        UserError: the environment is incomplete, another rank was lost, or what was raised inside.
        SystemExit: another rank prints why all end.
    """
    global _watch
    if world_size() == 1 or _watch is not None:
        yield
        return
    with _silence_other_ranks():
        _watch = _connect_ranks()
        outcome = "failed"
        try:
            yield
            outcome = "bye"
        except KeyboardInterrupt as interrupt:
            outcome = "stopped"
            _raise_loss_behind(interrupt)
            if not _watch.claim_report():
                raise SystemExit(130) from None
            raise
        except UserError:
            ended = _watch.watchdog.ended
            if _watch.watchdog.reports_loss() if ended and ended.kind == "lost" else _watch.claim_report():
                raise
            raise SystemExit(1) from None
        except RuntimeError as error:
            _raise_reason(error)
        finally:
            _watch.watchdog.close(outcome, linger_s=LINGER_S if is_main() and outcome != "bye" else 0)  # it may keep the store
            _watch = None


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Makes ``device`` the current one and initializes torch's process group for tensors on it, which ends whatever happens inside.

    A single process has no group.
    """
    make_current(device)
    if _watch is None or is_distributed():
        yield
        return
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
    """Why a collective failed: a sentence if another rank was lost, else empty. Waits some seconds for the watchdog's notice."""
    ended = _watch.watchdog.wait(NOTICE_S) if _watch else None
    return _watch.watchdog.loss_message() if _watch and ended and ended.kind == "lost" else ""


def main_rank_decision(decide: Callable[[], str]) -> str:
    """The text that ``decide`` returns on the main rank, on every rank. Needs no process group."""
    if _watch is None:
        return decide()
    key = _watch.new_key()
    if is_main():
        _watch.store.set(key, "=" + decide())
    else:
        _watch.wait_for(key)
    return _watch.store.get(key).decode()[1:]


@contextmanager
def local_main_first() -> Iterator[None]:
    """Runs the block on the first rank of each machine, then on the others, which find the caches it wrote. Waits without limit."""
    if _watch is None:
        yield
        return
    key = f"{_watch.new_key()}/{rank() - local_rank()}"
    if local_rank():
        _watch.wait_for(key)
    yield
    if not local_rank():
        _watch.store.set(key, "done")


def gradient_sync(network: nn.Module, *, now: bool) -> AbstractContextManager[Any]:
    """Around forward and backward: ``now`` decides whether gradients are averaged over ranks, or only summed for a later step."""
    return nullcontext() if now or not isinstance(network, nn.parallel.DistributedDataParallel) else network.no_sync()


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> None:
    """Replaces batch norms by synchronized ones, whose statistics are of the images of all ranks (``--sync-bn``), if there are several.

    Subclasses of batch norm, which have rules of their own, stay as they are.

    Raises:
        UserError: ranks on CPUs, for which torch has no synchronized batch norm.
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
    """Copies the main rank's values into the tensors of all ranks."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over all ranks; the value itself with one process. No gradient flows through it."""
    if not is_distributed():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def broadcast_object(value: Value) -> Value:
    """The main rank's value, on every rank. For small plain values such as a path or a decision."""
    if not is_distributed():
        return value
    holder: list[Any] = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def barrier() -> None:
    """Waits until all ranks get here."""
    if is_distributed():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in order of rank, on every rank. For plain values that are exchanged rarely, such as metrics."""
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
def _silence_other_ranks() -> Iterator[None]:
    """Discards what ranks other than the main one write to stdout; errors and warnings on stderr stay."""
    if is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _connect_ranks() -> _RankWatch:
    """Waits until all ranks have started.

    Raises:
        UserError: the environment is incomplete, or a rank is missing.
    """
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE={world_size()} but no {', '.join(missing)} in the environment: start several processes with torchrun")
    try:
        store = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))[0]
        watchdog = Watchdog(store, rank(), world_size(), host=os.environ["MASTER_ADDR"], name=Path(sys.argv[0]).name)
    except (RuntimeError, OSError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the {world_size()} processes do not meet at {place} ({' '.join(str(error).split())[:200]})") from error
    missing_ranks = watchdog.missing_ranks(CONNECT_S) if is_main() else []
    if missing_ranks:
        watchdog.close("failed")
        raise UserError(f"process(es) {', '.join(map(str, missing_ranks))} of {world_size()} cannot reach the main one, or have ended")
    return _RankWatch(dist.PrefixStore(watchdog.token, store), watchdog)  # the store and its keys may outlive a restart


def _raise_loss_behind(interrupt: KeyboardInterrupt) -> None:
    """Raises the loss of another rank where that is the reason of the signal: torchrun's agent stops the ranks that are left."""
    assert _watch is not None
    watchdog = _watch.watchdog
    ended = watchdog.wait(SIGNAL_NOTICE_S)
    if ended is None or ended.kind != "lost":
        return
    if watchdog.reports_loss():
        raise UserError("; ".join(filter(None, (watchdog.loss_message(), str(interrupt))))) from interrupt
    raise SystemExit(1) from None


def _raise_reason(error: RuntimeError) -> NoReturn:
    """Raises the end of another rank in place of the error that it caused here; the error itself if all ranks run."""
    assert _watch is not None
    watchdog = _watch.watchdog
    if watchdog.wait(NOTICE_S) is None:
        raise error
    if watchdog.reports_loss():
        raise UserError(watchdog.loss_message()) from error
    raise SystemExit(1) from None
