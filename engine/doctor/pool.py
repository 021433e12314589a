"""Checks cases in parallel, a process each: memory is released, cases are independent, a process that dies is a line of the table."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from engine.doctor.checkup import CHECKS, Case, Report, run_checks
from models.spec.registry import BLOCKS, load_plugin
from utils.memory import available_bytes, peak_bytes
from utils.process_exit import ending

GIB = 2**30
SHARE = 0.8  # of the available memory
# imported once before forking, as otherwise optimizer, export and session import them in every process
SHARED_IMPORTS = ("torch._dynamo", "torch.onnx.utils", "onnx", "onnxruntime")
# on Linux this process is forked, which runs no threads of torch yet; elsewhere forking is not safe
_CONTEXT: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@dataclass(frozen=True)
class Settings:
    """What is the same for all cases.

    Attributes:
        side: of the images, px.
        plugins: Python files that register blocks.
    """

    side: int
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """How many processes run at once, and their memory."""

    jobs: int
    memory: int  # bytes for all processes together; 0 where the system does not report its memory

    @classmethod
    def of(cls, *, jobs: int, memory_gib: float) -> Limits:
        """From flags; 0 means the number of cores, and a share of the available memory."""
        return cls(max(jobs, 0) or os.cpu_count() or 1, int(memory_gib * GIB) or int(SHARE * (available_bytes() or 0)))

    @property
    def flag(self) -> str:
        """The memory as a flag; empty where it is not known."""
        return f"--memory {self.memory / GIB:.3g}" if self.memory else ""

    def __str__(self) -> str:
        return f"{self.jobs} at a time{f', with {self.memory / GIB:.1f} GiB' if self.memory else ''}"


def check_all(cases: Sequence[Case], settings: Settings, limits: Limits) -> Iterator[Report]:
    """Yields reports as cases finish; a case that exceeds its share of the memory is checked again, alone and with all of the memory."""
    again = []
    for report in _check_in_parallel(cases, settings, limits, share=limits.memory // limits.jobs):
        if report.out_of_memory and limits.jobs > 1:
            again.append(report.case)
        else:
            yield report
    yield from _check_in_parallel(again, settings, Limits(1, limits.memory), share=limits.memory)


@dataclass(frozen=True)
class _Running:
    """A case and the process that checks it."""

    case: Case
    process: BaseProcess
    check: Any  # index in CHECKS of the current check, in shared memory


def _check_in_parallel(cases: Sequence[Case], settings: Settings, limits: Limits, *, share: int) -> Iterator[Report]:
    """Yields reports as cases finish; each process has ``share`` bytes."""
    _import_shared()
    waiting, running = list(reversed(cases)), dict[Connection, _Running]()
    try:
        while waiting or running:
            while waiting and len(running) < limits.jobs:
                connection, one = _start_process(waiting.pop(), settings, limits, share)
                running[connection] = one
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                yield _receive_report(ready, running.pop(ready))
    finally:
        for one in running.values():
            one.process.terminate()


def _import_shared() -> None:
    """Imports what every process needs; onnx may be missing, which the ONNX check reports."""
    len(BLOCKS)
    for name in SHARED_IMPORTS:
        try:
            importlib.import_module(name)
        except ImportError:
            continue


def _start_process(case: Case, settings: Settings, limits: Limits, share: int) -> tuple[Connection, _Running]:
    here, there = _CONTEXT.Pipe(duplex=False)
    check = _CONTEXT.RawValue("i", 0)
    process: BaseProcess = _CONTEXT.Process(target=_run_case, args=(there, case, settings, limits, share, check), daemon=True)
    process.start()
    there.close()  # the other process holds it too; while it is open here, the end of that process would go unnoticed
    return here, _Running(case, process, check)


def _receive_report(connection: Connection, one: _Running) -> Report:
    try:
        report: Report = connection.recv()
    except EOFError:  # the process died; a system that runs out of memory kills the largest
        one.process.join()
        return Report(one.case, {CHECKS[one.check.value]: _describe_exit(one.process.exitcode)}, out_of_memory=True)
    finally:
        connection.close()
    one.process.join()
    return report


def _describe_exit(status: int | None) -> str:
    """How a process without a report ended; one that runs out of memory is killed by the system, or aborts in native code."""
    return f"the process {ending(status)} (out of memory?)"


def _run_case(connection: Connection, case: Case, settings: Settings, limits: Limits, share: int, check: Any) -> None:
    """Checks one case in its own process and sends the report."""

    def record_check(name: str) -> None:
        check.value = CHECKS.index(name)

    torch.set_num_threads(1)
    for path in settings.plugins:
        load_plugin(path)
    _limit_memory(share)
    started = time.process_time()
    report = run_checks(case, side=settings.side, limit=limits.flag, on_check=record_check)
    report.seconds, report.peak_mib = time.process_time() - started, (peak_bytes() or 0) / 2**20
    connection.send(report)


def _limit_memory(size: int) -> None:
    """Makes allocations beyond ``size`` bytes fail in this process, on systems that support it."""
    try:
        import resource
    except ImportError:
        return
    if size and sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (size, hard))
