"""The worker processes of a loader."""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing import AuthenticationError
from types import TracebackType

import cv2
import torch


def start_worker(worker: int) -> None:
    """Turns threads off in a worker, since the workers are the parallelism already.

    A signal that stops the whole process group is handled by the main process: workers continue until it has finished its step.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
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
