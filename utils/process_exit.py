"""The end of a script although a thread hangs in foreign code, where nothing can reach it."""

from __future__ import annotations

import os
import sys
import threading
from typing import NoReturn

HANGING = "may hang: "  # the names of such threads begin so


def leave(status: int) -> NoReturn:
    """Ends the process with an exit status.

    Python waits at its end for threads whose names begin with ``HANGING`` (a stream's reader does, until its time-out), as one that wakes
    up when half of Python is gone aborts the process. A script has closed its files by now: it ends at once.
    """
    if any(thread.name.startswith(HANGING) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
