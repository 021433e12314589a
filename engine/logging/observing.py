"""What only observes a run (plots, loggers) must not stop it: a failure there is one line, and the run continues."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from utils.errors import UserError


@contextmanager
def observing(what: str) -> Iterator[None]:
    """Names a failure of what runs inside in one line, instead of raising it.

    Args:
        what: is made inside, for the line.
    """
    try:
        yield
    except Exception as error:
        print(f"warning: {what} failed ({reason_of(error)}); the run continues without", file=sys.stderr)


def reason_of(error: Exception) -> str:
    """A failure in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
