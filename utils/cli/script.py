"""The door of every script and command: one line and an exit status for whatever ends them early, expected or not."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from utils.cli.allocator import keep_freed_memory
from utils.errors import UserError, first_line, one_line, place_in_plugin

OK, FAILED, INTERRUPTED = 0, 1, 130
ERRORS = Path("runs") / "errors"  # tracebacks; the system's folder for temporary files where it cannot be written
ERRORS_VARIABLE = "YOLO_ERRORS"  # of the environment: another folder, as a study gives its trainings
MAX_LOG_CHARS = 1 << 20


def run_script(name: str, body: Callable[[], object], *, interrupted: str = "interrupted", reason: str = "") -> int:
    """Runs a script and returns its exit status.

    Args:
        name: of the script, which begins the line of an error.
        body: reads the command line and does the work.
        interrupted: what is printed after Ctrl-C.
        reason: what is added to it where the interruption gives no reason of its own.
    """

    def run() -> int:
        body()
        return OK

    return run_command(name, run, interrupted=interrupted, reason=reason)


def run_command(name: str, body: Callable[[], int], *, failed: int = FAILED, interrupted: str = "interrupted", reason: str = "") -> int:
    """Runs a command whose body returns an exit status; see :func:`run_script`.

    Args:
        failed: exit status after an error.
    """
    try:
        keep_freed_memory()
        return body()
    except UserError as error:
        print(f"{name}: {one_line(str(error))}", file=sys.stderr)
    except KeyboardInterrupt as interrupt:
        reason = str(interrupt) or reason
        print(f"{name}: {interrupted}{'; ' if reason else ''}{reason}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as head, has enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush fails
    except Exception as error:
        print(f"{name}: {one_line(_unexpected(error))}; {_logged(name, error)}", file=sys.stderr)
    return failed


def _unexpected(error: Exception) -> str:
    from utils.memory import is_out_of_memory  # imports torch

    if is_out_of_memory(error):
        return f"not enough memory ({first_line(error)}); a smaller --imgsz or --batch-size needs less"
    if place := place_in_plugin(error):
        return f"{place}: {type(error).__name__}: {first_line(error)}"
    if isinstance(error, OSError) and error.strerror:  # a full disk, a file without permission
        return f"{error.filename or 'input or output'}: {error.strerror}"
    return f"internal error, please report: {type(error).__name__}: {first_line(error)}"


def _logged(name: str, error: Exception) -> str:
    """Writes the traceback to a file and says where it is; without a file it is printed.

    The command line is left out of it, as it may hold the password of a stream.
    """
    torch_version = getattr(sys.modules.get("torch"), "__version__", "not imported")
    versions = f"{name}, Python {platform.python_version()}, torch {torch_version}, {platform.platform()}"
    text = versions + "\n" + "".join(traceback.format_exception(error))[-MAX_LOG_CHARS:]
    stem = name.split(".")[-2 if name.endswith(".py") else -1].replace(" ", "-")
    file_name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (Path(os.environ.get(ERRORS_VARIABLE) or ERRORS), Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file_name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return f"traceback in {folder / file_name}"
    print(text, file=sys.stderr)
    return "no folder for a log can be written, so the traceback is above"
