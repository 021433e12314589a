"""Runs a small study to its end, and another that is killed three times: ``python -m tests.study_kills FOLDER``.

Trainings are forked, which saves the imports. Beside each study ``table.json`` is written: its records and the curves behind them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import study
from engine.study.measuring import measure
from engine.study.processes import _end_with_parent, _is_free
from engine.study.records import Study
from engine.study.run_files import Job, can_resume, is_trained
from tests.tiny_training import make_world
from train import train
from utils.cli.study_arguments import parse_arguments
from utils.config import TrainConfig

LIMIT_S = 600


def main(root: Path) -> None:
    torch.set_num_threads(1)
    world = make_world(root / "world")
    whole, cut = root / "whole", root / "cut"
    assert wait(start_study(world, whole)) == 0
    runs = cut / "runs"

    def epochs(name: str) -> int:
        return len((runs / name / "results.csv").read_text().splitlines()) - 1 if (runs / name / "results.csv").is_file() else 0

    for due in (
        lambda: epochs("none-seed0") >= 1,
        lambda: (runs / "none-seed0" / "study_metrics.json").is_file() and (runs / "none-seed1" / "weights" / "last.pt").is_file(),
        lambda: epochs("MHSA@3-seed0") >= 1,
    ):
        kill_when(due, start_study(world, cut))
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/study_metrics.json")}
    assert wait(start_study(world, cut)) == 0
    repeated = [path.parent.name for path, written in before.items() if path.stat().st_mtime_ns != written]
    print(json.dumps({"repeated": repeated, "finished_before": len(before)}))


def start_study(world: Path, folder: Path) -> int:
    """Forks a process that runs the study; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        study.report = write_table
        request = parse_arguments(
            ["--cfg", str(world / "tiny-v9.yaml"), "--attention", "none", "MHSA@3", "--seeds", "0", "1", "--data", str(world / "data.yaml")]
            + ["--epochs", "2", "--imgsz", "64", "--batch-size", "4", "--workers", "0", "--latency", "0", "--train", "noplots=true"]
            + ["--project", str(folder.parent), "--name", folder.name, "--devices", "cpu"]
        )
        study.study(request, start=ForkedTraining)
        code = 0
    os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_when(due: Callable[[], bool], child: int) -> None:
    """Kills the study once something has happened in its folder; it must not have ended by itself."""
    end = time.monotonic() + LIMIT_S
    while not due():
        assert os.waitpid(child, os.WNOHANG)[0] == 0, "the study ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert wait(child) == -signal.SIGKILL


def write_table(found: Study, folder: Path) -> None:
    rows = [
        [r.variant, r.seed, r.status.value, dict(r.metrics), {k: list(v) for k, v in r.curves.items()}, dict(r.per_class)]
        for r in found.records
    ]
    (folder / "table.json").write_text(json.dumps(rows))


class ForkedTraining:
    """Trains, or resumes, and measures in a forked process."""

    def __init__(self, job: Job, device: str) -> None:
        while not _is_free(job.folder):  # what a killed study left is ending
            time.sleep(0.01)
        self.pid = os.fork()
        if self.pid == 0:
            _end_with_parent()
            os._exit(self.in_child(job, device))

    @staticmethod
    def in_child(job: Job, device: str) -> int:
        try:
            with open(job.folder / "train.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                if not is_trained(job):
                    train(TrainConfig(resume=str(job.last)) if can_resume(job) else TrainConfig(**job.flags, device=device))
                measure(job.folder, job.compare, device=device)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        return 0

    def poll(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def wait(self) -> None:
        os.waitpid(self.pid, 0)

    def reason(self) -> str:
        return "see its log"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
