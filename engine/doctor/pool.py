"""Many check-ups at once: a process each, so that memory comes back, none can spoil another, and one that dies is a line of the table."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from engine.doctor.checkup import CHECKS, Case, Report, examine
from models.spec.registry import BLOCKS, load_plugin

GIB = 2**30
SHARE = 0.8  # of the memory that is free
# imported once, before processes are split off: an optimizer, an export and a session bring them in otherwise, each time anew
SHARED_IMPORTS = ("torch._dynamo", "torch.onnx.utils", "onnx", "onnxruntime")
# Linux splits off a copy of this process, which runs no threads of torch's yet; elsewhere that is not safe
_CONTEXT: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@dataclass(frozen=True)
class Job:
    """What every process is told besides its case.

    Attributes:
        side: of the images, px.
        plugins: files with blocks of the user's own.
    """

    side: int
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """How much of the machine is used."""

    jobs: int
    memory: int  # bytes for all processes together; 0 where the system does not say what it has

    @classmethod
    def of(cls, *, jobs: int, memory_gib: float) -> Limits:
        """From flags; 0 means the number of cores, and a share of the free memory."""
        return cls(max(jobs, 0) or os.cpu_count() or 1, int(memory_gib * GIB) or int(SHARE * _free_memory()))

    @property
    def flag(self) -> str:
        """How the user writes the memory; empty where it is not known."""
        return f"--memory {self.memory / GIB:.3g}" if self.memory else ""

    def __str__(self) -> str:
        return f"{self.jobs} at a time{f', with {self.memory / GIB:.1f} GiB' if self.memory else ''}"


def examine_all(cases: Sequence[Case], job: Job, limits: Limits) -> Iterator[Report]:
    """Reports as they come; what runs out of its share of the memory is examined again, alone and with all of it."""
    again = []
    for report in _examine(cases, job, limits, share=limits.memory // limits.jobs):
        if report.out_of_memory and limits.jobs > 1:
            again.append(report.case)
        else:
            yield report
    yield from _examine(again, job, Limits(1, limits.memory), share=limits.memory)


@dataclass(frozen=True)
class _Running:
    """A case and the process that examines it."""

    case: Case
    process: BaseProcess
    check: Any  # the index in CHECKS of what the process is at, in memory that both see


def _examine(cases: Sequence[Case], job: Job, limits: Limits, *, share: int) -> Iterator[Report]:
    """Reports as they come, of processes that have ``share`` bytes each."""
    _prepare()
    waiting, running = list(reversed(cases)), dict[Connection, _Running]()
    try:
        while waiting or running:
            while waiting and len(running) < limits.jobs:
                connection, one = _start(waiting.pop(), job, limits, share)
                running[connection] = one
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                yield _result(ready, running.pop(ready))
    finally:
        for one in running.values():
            one.process.terminate()


def _prepare() -> None:
    """Loads what every process needs; onnx may be missing, which the check that needs it says."""
    len(BLOCKS)
    for name in SHARED_IMPORTS:
        try:
            importlib.import_module(name)
        except ImportError:
            continue


def _start(case: Case, job: Job, limits: Limits, share: int) -> tuple[Connection, _Running]:
    here, there = _CONTEXT.Pipe(duplex=False)
    check = _CONTEXT.RawValue("i", 0)
    process: BaseProcess = _CONTEXT.Process(target=_work, args=(there, case, job, limits, share, check), daemon=True)
    process.start()
    there.close()  # the other process holds it too; while it is open here, that one's death would not be seen
    return here, _Running(case, process, check)


def _result(connection: Connection, one: _Running) -> Report:
    try:
        report: Report = connection.recv()
    except EOFError:  # it died; a system that ran out of memory kills the largest
        one.process.join()
        return Report(one.case, {CHECKS[one.check.value]: _death(one.process.exitcode)}, out_of_memory=True)
    finally:
        connection.close()
    one.process.join()
    return report


def _death(status: int | None) -> str:
    """How a process ended that gave no report; who runs out of memory is killed by the system, or aborts in code that cannot go on."""
    if status is None or status >= 0:
        return f"the process ended with status {status} (out of memory?)"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"the process was killed by {name} (out of memory?)"


def _work(connection: Connection, case: Case, job: Job, limits: Limits, share: int, check: Any) -> None:
    """What a process does: one case."""

    def begin(name: str) -> None:
        check.value = CHECKS.index(name)

    torch.set_num_threads(1)
    for path in job.plugins:
        load_plugin(path)
    _limit_memory(share)
    started = time.process_time()
    report = examine(case, side=job.side, limit=limits.flag, begin=begin)
    report.seconds, report.peak_mib = time.process_time() - started, _peak_mib()
    connection.send(report)


def _limit_memory(size: int) -> None:
    """Lets allocations beyond ``size`` bytes fail in this process, where the system can do that."""
    try:
        import resource
    except ImportError:
        return
    if size and sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (size, hard))


def _peak_mib() -> float:
    """The most memory that this process had in use; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _free_memory() -> int:
    """Bytes that new processes can have; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
