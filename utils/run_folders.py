"""Run folders: a new one for each run (race-free), written by one process at a time, and the newest weights when none are given."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.errors import UserError

MAX_RUNS = 100_000
LOCK_FILE = ".lock"
MAX_LOCK_BYTES = 4096
LOCKED_BYTE = 1 << 20  # on Windows, where a locked byte cannot be read; behind the text
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of Linux: the same in all containers of a machine


def new_run_dir(project: str | Path, name: str = "exp", exist_ok: bool = False) -> Path:
    """Makes and returns ``project/name``, or ``project/name2``, ``name3`` … where that is taken.

    The folder is made in the same step that finds it free, so that two runs started at once never share one.

    Raises:
        UserError: the project folder cannot be made or written.
    """
    project = Path(project).expanduser()
    try:
        project.mkdir(parents=True, exist_ok=True)
        if exist_ok:
            (project / name).mkdir(parents=True, exist_ok=True)
            return project / name
        for number in range(1, MAX_RUNS):
            folder = project / (name if number == 1 else f"{name}{number}")
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise UserError(f"{project}: cannot be written ({error.strerror or error}); give another --project") from None
    raise UserError(f"{project}: {MAX_RUNS} runs named {name!r} are there; give another --name")


@contextlib.contextmanager
def run_dir_if_used(project: str | Path, name: str = "exp", exist_ok: bool = False) -> Iterator[Path]:
    """The same for the length of a block; a new folder into which the block wrote nothing goes again."""
    folder = new_run_dir(project, name, exist_ok)
    try:
        yield folder
    finally:
        if not exist_ok:
            remove_empty(folder)


def newest_weights(root: str | Path = "runs/train", filename: str = "best.pt") -> Path:
    """The checkpoint ``filename`` of the newest run below ``root``; where a run has none, its last.pt counts.

    Raises:
        UserError: there is no run with a checkpoint.
    """
    root = Path(root)
    folders = [p for p in root.glob("**/weights") if p.is_dir()]
    candidates = [w for f in folders for w in (f / filename, f / "last.pt") if w.is_file()]
    if not candidates:
        raise UserError(f"{root}: no run with weights there; train first (python train.py) or give --weights")
    newest_folder = max(candidates, key=lambda w: w.stat().st_mtime_ns).parent
    return next(w for w in candidates if w.parent == newest_folder)


@dataclass(frozen=True)
class LockOwner:
    """The process that writes a run folder.

    Attributes:
        host: name of its machine, or of its container.
        boot: identifies the running system; empty where there is no such id.
        started: when the process started, as the system counts it, so that a number that is used again is recognised; empty if unknown.
        job: id of the job that started it, the same after a restart; empty if there is none.
    """

    pid: int = 0
    host: str = ""
    boot: str = ""
    started: str = ""
    job: str = ""

    @classmethod
    def this_process(cls, job: str) -> LockOwner:
        boot = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ""
        return cls(os.getpid(), socket.gethostname(), boot, _start_of(os.getpid()), job)

    @classmethod
    def from_bytes(cls, content: bytes) -> LockOwner | None:
        """The owner that a lock file names; None for an empty or a damaged file."""
        try:
            values = json.loads(content)
            return cls(int(values["pid"]), *(str(values[name]) for name in ("host", "boot", "started", "job")))
        except (ValueError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """Keeps other processes out of the run folders that it takes; a context manager that releases them.

    A ``.lock`` file names the owner, and the system's lock on it ends with the process however that ends, so that a file that is left
    behind is recognised. Only the main rank takes a folder. A new folder into which nothing was written goes with the lock.
    """

    def __init__(self) -> None:
        self._held: dict[Path, int] = {}
        self._new: list[Path] = []

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        while self._held:
            folder, descriptor = self._held.popitem()
            _release(folder / LOCK_FILE, descriptor)
        for folder in self._new:
            remove_empty(folder)

    def take(self, folder: Path, *, is_new: bool = False, job: str = "") -> None:
        """Takes a folder until the end of the context.

        Args:
            is_new: this process has made it.
            job: id of the job that started this process; a job that was started again takes what its former processes left.

        Raises:
            UserError: another process writes the folder, or may do so, or the folder cannot be written.
        """
        folder = folder.absolute()
        if folder in self._held:
            return
        try:
            descriptor, locked = _open_locked(folder / LOCK_FILE)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
        own = LockOwner.this_process(job)
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            _refuse_living(folder, LockOwner.from_bytes(os.read(descriptor, MAX_LOCK_BYTES)), own, locked=locked)
        except UserError:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(asdict(own)).encode())
        self._held[folder] = descriptor
        if is_new:
            self._new.append(folder)


def remove_empty(folder: Path) -> None:
    """Removes a folder that holds no file, with the folders in it."""
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # it holds something
            os.rmdir(parent)


def _open_locked(path: Path) -> tuple[int, bool | None]:
    """The opened lock file, and whether the system's lock on it was free; None where there are no such locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        locked = _lock(descriptor)
        with contextlib.suppress(FileNotFoundError):
            if locked is False or os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor, locked
        os.close(descriptor)  # of a file that its owner has just removed


def _lock(descriptor: int) -> bool | None:
    """Takes the system's lock of an open file; False if another process has it, None where the file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loader processes would inherit it
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK) else None
    return True


def _refuse_living(folder: Path, owner: LockOwner | None, own: LockOwner, *, locked: bool | None) -> None:
    """Refuses a folder whose owner runs, or of which that cannot be told."""
    writes = f"{folder}: {owner or 'another process'} trains in it, or is finishing"
    if locked is False:
        raise UserError(f"{writes}; wait until it has ended, or stop it")
    if owner is None:
        return
    if owner.host != own.host and not (owner.boot and owner.boot == own.boot and locked):
        if owner.job and owner.job == own.job:
            return
        file = folder / LOCK_FILE
        raise UserError(f"{folder}: {owner} trains in it, or was killed, which {own.host} cannot tell; if it has ended, remove {file}")
    if owner.boot == own.boot and owner.started == _start_of(owner.pid) != "":
        raise UserError(f"{writes}; wait until it has ended, or stop it")
    if not (owner.started or locked) and _is_running(owner.pid):
        raise UserError(f"{writes}; if it has ended, remove {folder / LOCK_FILE}")


def _start_of(pid: int) -> str:
    """When a process started, in ticks since the system's start; empty for one that has ended, and where the system has no /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state == "Z" or len(fields) < 19 else fields[18]


def _is_running(pid: int) -> bool:
    """Whether there is a process of this number; assumed where the system does not say."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def _release(path: Path, descriptor: int) -> None:
    """Removes a lock file; a file that cannot be removed locks nothing."""
    if sys.platform == "win32":  # removes no open file
        os.close(descriptor)
    with contextlib.suppress(OSError):
        path.unlink()
    if sys.platform != "win32":
        os.close(descriptor)
