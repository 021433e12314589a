"""Kills and resumes trainings in forked processes: ``python -m tests.process_kills PLAN.json``.

A plan is ``{"config": flags of the run, "kills": number, "seed": number}``. The first run (folder ``whole``) is not interrupted; the second
(folder ``cut``) is killed ``kills`` times at random moments and resumed. The result is printed as JSON. Forking saves the imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from engine.logging.callbacks import Callback
from models.checkpoints.checkpoint import load_checkpoint
from train import train
from utils.config import Hyperparameters, TrainConfig
from utils.files import UNFINISHED

LIMIT_S = 1800


class BatchPulse(Callback):
    """Writes one byte to a pipe per batch."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_batch(self, run, epoch, iteration, batch) -> None:
        os.write(self.pipe, b".")


def main(plan: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    rng = random.Random(plan["seed"])
    flags = {**plan["config"], "hyp": Hyperparameters(**plan["config"]["hyp"])}
    started = time.monotonic()
    steps = attempt(TrainConfig(**{**flags, "name": "whole"}))[1]
    whole_s = time.monotonic() - started
    last = Path(flags["project"]) / "cut" / "weights" / "last.pt"
    most = max(steps // plan["kills"] - 2, 1)  # batches before a kill; keeps the run from ending before the last kill
    found: dict[str, Any] = {"kills": 0, "steps": steps, "corrupt": [], "moments": [], "partials": 0}
    while found["kills"] < plan["kills"]:
        config = TrainConfig(resume=last) if last.exists() else TrainConfig(**{**flags, "name": "cut", "exist_ok": True})
        moment = rng.randint(0, most), rng.uniform(0.0, whole_s / steps)
        status, _ = attempt(config, kill_after=moment, start_s=rng.uniform(0.0, 1.0) if rng.random() < 0.2 else None)
        if status != -signal.SIGKILL:
            found["ended"] = status
            return found
        found["kills"] += 1
        found["partials"] += len(list(last.parent.glob(UNFINISHED)))
        for path in last.parent.glob("last*.pt"):
            try:
                checkpoint = load_checkpoint(path)
                found["moments"].append((checkpoint.epoch, checkpoint.training["batch"]))
            except Exception as error:
                found["corrupt"].append(str(error))
    found["ended"] = attempt(TrainConfig(resume=last))[0] if last.exists() else "nothing was saved"
    deadline = time.monotonic() + 300  # loader processes check every five seconds whether their parent is alive
    while (found_orphans := orphans(flags["project"])) and time.monotonic() < deadline:
        time.sleep(0.2)
    found["orphans"] = found_orphans
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


def attempt(config: TrainConfig, *, kill_after: tuple[int, float] | None = None, start_s: float | None = None) -> tuple[int, int]:
    """Trains in a forked process; returns its exit code (negative: the signal that ended it) and its number of batches.

    Args:
        kill_after: it is killed after so many batches and so many seconds.
        start_s: seconds from its start after which it is killed regardless of its progress.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os._exit(run(config, write))
    os.close(write)
    begun, beats = time.monotonic(), 0
    end = begun + (LIMIT_S if start_s is None else start_s)
    while (code := exit_code(child)) is None:
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            break
        if select.select([read], [], [], 0.005)[0]:
            beats += len(os.read(read, 1))
        if kill_after is not None and beats > kill_after[0]:  # limits extra batches if the machine became faster
            end = min(end, time.monotonic() + (kill_after[1] if beats == kill_after[0] + 1 else 0.0))
    os.set_blocking(read, False)
    with contextlib.suppress(BlockingIOError):
        beats += len(os.read(read, 65536))
    os.close(read)
    return code, beats


def exit_code(child: int) -> int | None:
    """Exit code of a child; None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def run(config: TrainConfig, pipe: int) -> int:
    """Trains in the forked process; returns its exit code."""
    os.setpgid(0, 0)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train(config, callbacks=[BatchPulse(pipe)])
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def orphans(project: str) -> list[int]:
    """Ids of processes with this command line that are still alive: loader processes whose parent was killed."""
    own = " ".join(psutil.Process().cmdline())
    alive = [p for p in psutil.process_iter(["cmdline", "pid", "status"]) if " ".join(p.info["cmdline"] or ()) == own]
    return [p.info["pid"] for p in alive if p.info["pid"] != os.getpid() and p.info["status"] != psutil.STATUS_ZOMBIE]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
