"""A rank that is killed in a validation ends the others with the line that names it, with an agent that stops them and without."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_training import make_world

ROOT = Path(__file__).parents[2]
CASES = [(0, True), (1, True), (1, False)]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("jobs")
    world = make_world(tmp_path_factory.mktemp("world"))
    common = {"cfg": str(world / "tiny-v9.yaml"), "data": str(world / "data.yaml"), "imgsz": 64, "epochs": 2, "batch_size": 4, "workers": 1}
    plan = []
    for rank, agent in CASES:
        name = f"{rank}-{agent}"
        config = {**common, "device": "cpu", "noplots": True, "project": str(root / name / "runs")}
        plan.append({"name": name, "kind": "lost_in_validation", "world": 2, "rank": rank, "agent": agent, "config": config})
    (root / "jobs.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "tests.processes", str(root / "jobs.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("rank", "agent"), CASES)
def test_rank_killed_in_validation_is_named_in_one_line(jobs, rank, agent):
    job = jobs[f"{rank}-{agent}"]
    assert job["codes"] == [-signal.SIGKILL if r == rank else 1 for r in (0, 1)]
    (line,) = [line for line in "\n".join(job["stderr"]).replace("\r", "\n").splitlines() if line.startswith("train.py: ")]
    assert line.startswith(f"train.py: process {rank} of 2 was lost")
    assert "holds 0 of 2 epochs" in line
    assert "resume with --resume" in line
