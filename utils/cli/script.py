"""What the command lines of all scripts share: one line and an exit status for whatever ends them early."""

from __future__ import annotations

import sys
from collections.abc import Callable

from utils.errors import UserError

OK, FAILED, INTERRUPTED = 0, 1, 130


def run_script(name: str, body: Callable[[], object], *, interrupted: str = "interrupted", reason: str = "") -> int:
    """Runs a script and returns its exit status.

    Args:
        name: of the script, which begins the line of an error.
        body: reads the command line and does the work.
        interrupted: what is printed after Ctrl-C.
        reason: what is added to it where the interruption gives no reason of its own.
    """
    try:
        body()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as interrupt:
        reason = str(interrupt) or reason
        print(f"{name}: {interrupted}{'; ' if reason else ''}{reason}", file=sys.stderr)
        return INTERRUPTED
    return OK
