"""Runs trainings in processes that can be killed, forked from one that has everything imported: ``python -m tests.killing PLAN.json``.

A plan is ``{"config": flags of the run, "resume": path of its last.pt, "kills": number, "seed": number}``. The first run is left alone in
a folder of its own; the second is killed ``kills`` times, each time at a random moment, and resumed. What happened is printed as JSON.
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

LIMIT_S = 300


class Beat(Callback):
    """Writes a byte to a pipe for every batch."""

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
    most = max(steps // plan["kills"] - 2, 1)  # batches before a kill, so that the run does not end before the last one
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
    deadline = time.monotonic() + 15  # a loader process looks every five seconds whether its parent lives
    while (found_orphans := orphans(flags["project"])) and time.monotonic() < deadline:
        time.sleep(0.2)
    found["orphans"] = found_orphans
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


def attempt(config: TrainConfig, *, kill_after: tuple[int, float] | None = None, start_s: float | None = None) -> tuple[int, int]:
    """Trains in a forked process; returns its exit code (negative: the signal that ended it) and the batches it saw.

    Args:
        kill_after: batches, and seconds after them, after which it is killed.
        start_s: seconds from its start after which it is killed whatever it has done.
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
        if kill_after is not None and beats > kill_after[0]:  # but not many batches later, should the machine have become faster
            end = min(end, time.monotonic() + (kill_after[1] if beats == kill_after[0] + 1 else 0.0))
    os.set_blocking(read, False)
    with contextlib.suppress(BlockingIOError):
        beats += len(os.read(read, 65536))
    os.close(read)
    return code, beats


def exit_code(child: int) -> int | None:
    """None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def run(config: TrainConfig, pipe: int) -> int:
    """What the forked process does."""
    os.setpgid(0, 0)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train(config, callbacks=[Beat(pipe)])
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def orphans(project: str) -> list[int]:
    """Processes that were forked from this one and have lost their parent."""
    own = " ".join(psutil.Process().cmdline())
    alive = [p for p in psutil.process_iter(["cmdline", "pid", "status"]) if " ".join(p.info["cmdline"] or ()) == own]
    return [p.info["pid"] for p in alive if p.info["pid"] != os.getpid() and p.info["status"] != psutil.STATUS_ZOMBIE]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
