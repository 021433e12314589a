"""A training as processes: train.py, or its resume, then the measurement of its weights; the log of both is a file of the run folder."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.study.run_files import LOG_FILE, Job, can_resume, is_trained
from utils import distributed
from utils.cli.flags import flags_of
from utils.cli.script import ERRORS_VARIABLE
from utils.config import TrainConfig
from utils.errors import UserError, printable
from utils.process_exit import ending
from utils.run_folders import RunLock

ROOT = Path(__file__).parents[2]
GRACE_S = 60.0  # for a training to save itself after Ctrl-C
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # of a restarted job: train.py would resume the job's newest run
LAST_BYTES = 1 << 16  # of a log that are searched for the reason
_PROGRESS = re.compile(r"\d+%\|")  # of a bar
_OWN_LINE = re.compile(r"^(?:train\.py|study measurement): (?P<reason>.+)")


class TrainingProcess:
    """A training that runs, step by step.

    Args:
        job: whose run folder exists.
        device: of ``--device``; empty for the default.
        threads: of the processor that it may use; None for all.
    """

    def __init__(self, job: Job, *, device: str, threads: int | None = None) -> None:
        self.job, self.device, self.threads = job, device, threads
        self.is_measuring = False
        self.process: subprocess.Popen[bytes] | None = None
        self._next()

    def poll(self) -> int | None:
        """Exit status of the whole; None while it runs."""
        if self.process is None:  # another process still writes the folder
            self._next()
            return None
        code = self.process.poll()
        if code is None:
            return None
        if code == 0 and not self.is_measuring:
            self._next()
            return None
        return code

    def interrupt(self) -> None:
        """Asks it to save and to end, as Ctrl-C does."""
        self._signal(signal.SIGINT)

    def wait(self) -> None:
        """Waits for an interrupted training to end; kills it if it does not."""
        if self.process is not None:
            for sent, seconds in ((None, GRACE_S), (signal.SIGTERM, 10.0), (signal.SIGKILL, None)):
                if sent is not None:
                    self._signal(sent)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
                    break

    def reason(self) -> str:
        """Why it failed: the last line of the script's own in the log; where it has none, how it ended and the last line."""
        return reason_in(self.job.folder / LOG_FILE, status=self.process.poll() if self.process else None)

    def _next(self) -> None:
        """Starts what is to be done next, unless another process, such as one that a killed study left, still writes the folder."""
        if not _is_free(self.job.folder):
            return
        self.is_measuring = is_trained(self.job)
        command = _measurement(self.job, self.device) if self.is_measuring else _training(self.job, self.device)
        with open(self.job.folder / LOG_FILE, "ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._environment(), start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
        threads = {} if self.threads is None or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(self.threads)}
        inherited = {name: value for name, value in os.environ.items() if name not in RESTARTS}
        return {**inherited, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", ERRORS_VARIABLE: str(self.job.folder.absolute()), **threads}

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)  # train.py ends its loader processes


def _end_with_parent() -> None:
    """In the child, on Linux: it is interrupted when the study is killed, so that nothing trains on unseen."""
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _is_free(folder: Path) -> bool:
    """Whether no other process writes the run folder."""
    try:
        with RunLock() as lock:
            lock.take(folder, job=distributed.job_id())
    except UserError:
        return False
    return True


def _training(job: Job, device: str) -> list[str]:
    """The command that trains the job, or resumes it where it has a save."""
    command = [sys.executable, str(ROOT / "train.py")]
    if can_resume(job):
        plugins = job.flags.get("plugins") or ()
        return [*command, *arguments({"resume": str(job.last), "device": device, "plugins": plugins})]
    return [*command, *arguments({**job.flags, **({"device": device} if device else {})})]


def _measurement(job: Job, device: str) -> list[str]:
    return [sys.executable, "-m", "engine.study.measuring", str(job.folder.absolute()), job.compare, device]


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """Flags of train.py as its command line."""
    out: list[str] = []
    for flag in flags_of(TrainConfig):
        value = flags.get(flag.name, flag.default)
        if value == flag.default or value in (None, "", (), []):
            continue
        out.append(flag.spelling)
        if flag.scalar is not bool:
            out += [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
    return out


def reason_in(log: Path, *, status: int | None = None) -> str:
    """The reason in what the last command wrote to a log; where it gives none, its exit status and the last line."""
    try:
        with open(log, "rb") as file:
            file.seek(max(os.path.getsize(log) - LAST_BYTES, 0))
            lines = [line.strip() for line in re.split(r"[\r\n]+", file.read().decode("utf-8", "replace")) if line.strip()]
    except OSError:
        lines = []
    begin = max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    lines = [line for line in lines[begin + 1 :] if not _PROGRESS.search(line)]
    own = [match["reason"] for line in lines if (match := _OWN_LINE.match(line))]
    if own:
        return printable(own[-1])[:500]
    last = f"; its last line: {lines[-1]}" if lines else ""
    how = f"it {ending(status)}" if status else "it ended"
    full = ", as the system does where memory is full" if status == -signal.SIGKILL else ""
    return printable(f"{how}{full}, without a message{last}")[:500]


def starter(*, jobs: int) -> Callable[[Job, str], TrainingProcess]:
    """The function by which a runner starts a training; ``jobs`` of them share the processor."""
    threads = max((os.cpu_count() or 1) // jobs, 1) if jobs > 1 else None
    return lambda job, device: TrainingProcess(job, device=device, threads=threads)
