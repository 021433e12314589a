"""Ends a script although a thread hangs in foreign code, where nothing can interrupt it; and how another process ended, in words."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NoReturn

MAY_HANG = "may hang: "  # prefix of the names of such threads


def ending(status: int | None) -> str:
    """How a process ended, by its status as ``subprocess`` gives it: ``ended with status 3``, ``was killed by SIGKILL``."""
    if status is None or status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def exit_process(status: int) -> NoReturn:
    """Ends the process with an exit status.

    An ``atexit`` handler waits for threads whose names begin with ``MAY_HANG`` (a stream's reader, until its time-out): one that wakes up
    during interpreter shutdown would abort the process. A script has closed its files by now and need not wait.
    """
    if any(thread.name.startswith(MAY_HANG) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
