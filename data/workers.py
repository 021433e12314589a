"""The worker processes of a loader: what each does when it starts, and when the main process hears that one was killed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from types import FrameType, TracebackType

import cv2
import torch

from utils.cli.allocator import keep_less_freed_memory

CONNECTION_LOST_S = 5.0  # from the loss of a killed worker's connections to the signal that it has ended, at most


class WorkerDeaths:
    """Delays torch's report that a worker was killed until the main process waits for a batch.

    torch raises that report out of the handler of SIGCHLD, thus wherever the main thread is: within an optimizer step, while a
    checkpoint is written, or in a callback, whose errors are only warned of.
    """

    def __init__(self) -> None:
        self._report: Callable[[int, FrameType | None], object] | None = None
        self._waiting = self._pending = False

    def delay(self) -> None:
        """Takes the place of torch's handler, which is there once an iterator with workers is; in other threads it never is."""
        in_main = threading.current_thread() is threading.main_thread()
        if self._report is None and in_main and hasattr(signal, "SIGCHLD"):  # Windows has none
            report = signal.getsignal(signal.SIGCHLD)
            if callable(report):
                self._report = report
                signal.signal(signal.SIGCHLD, self._handle)

    @contextmanager
    def reported(self) -> Iterator[None]:
        """The main thread waits for a batch inside.

        Raises:
            RuntimeError: of torch: a worker was killed, now or since the last batch.
        """
        if self._report is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._waiting = True
        try:
            if self._pending:
                self._handle(signal.SIGCHLD, None)
            yield
        except (OSError, EOFError) as error:
            if "Traceback" not in str(error):  # not raised in a worker: a killed one loses its connections first
                time.sleep(CONNECTION_LOST_S)
            raise
        finally:
            self._waiting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pending = not self._waiting
        if self._waiting and self._report is not None:
            self._report(number, frame)


WORKER_DEATHS = WorkerDeaths()  # one, as a process has one handler


def start_worker(worker: int) -> None:
    """Turns threads off in a worker, since the workers are the parallelism already, and keeps its memory small.

    A signal that stops the whole process group is handled by the main process: workers continue until it has finished its step.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    keep_less_freed_memory()
    sys.excepthook = _report_error
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parent_signal, daemon=True).start()


def _report_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an error, unless the thread that hands batches over lost the main process, which was interrupted while it took one."""
    if threading.current_thread() is threading.main_thread() or not isinstance(error, (OSError, EOFError, AuthenticationError)):
        sys.__excepthook__(kind, error, trace)


def _exit_on_parent_signal() -> None:
    """Ends the process on a SIGTERM that the main process sent, and ignores all others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
