"""What every task has in common: several processes train as one, the search for hyper-parameters, the doctor."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import doctor
from engine.training.evolve import evolve
from models.checkpoints.checkpoint import load_checkpoint
from tests.e2e import test_classify_run, test_obb_run, test_pose_run, test_segment_run
from tests.tiny_training import make_world
from train import train
from utils.config import Hyperparameters, TrainConfig

ROOT = Path(__file__).parents[2]
SETS = {
    "segment": ("tiny-seg.yaml", "data.yaml"), "pose": ("tiny-Pose.yaml", "data.yaml"), "obb": ("tinyn-v8.yaml", "data.yaml"),
    "classify": ("tiny-cls.yaml", "colours"),
}  # fmt: skip
HYP = {"warmup_epochs": 1, "warmup_min_iters": 0, "nbs": 8}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("worlds")
    for name in SETS:
        (root / name).mkdir()
    test_segment_run.make_world(root / "segment")
    test_pose_run.make_images(root / "pose")
    (make_world(root / "obb") / "tinyn-v8.yaml").write_text(test_obb_run.ROWS.format(**test_obb_run.FORMS["v8"]))
    test_classify_run.make_images(root / "classify")
    return root


def flags(worlds: Path, task: str, project: Path, **changes) -> dict:
    cfg, data = (str(worlds / task / name) for name in SETS[task])
    size = {"imgsz": 64, "epochs": 2, "batch_size": 4, "workers": 0, "device": "cpu", "amp": "off", "precise_bn": 0, "optimizer": "SGD"}
    return {"cfg": cfg, "data": data, "hyp": HYP, "project": str(project), "noplots": True, "seed": 3, **size, **changes}


@pytest.fixture(scope="module")
def jobs(worlds, tmp_path_factory) -> Path:
    """A training of every task by one process and by two, with the running statistics of the start."""
    root = tmp_path_factory.mktemp("jobs")
    made = [
        {"name": f"{task}-{n}", "kind": "train", "world": n, "frozen": True, "config": flags(worlds, task, root / f"{task}{n}")}
        for task in SETS
        for n in (1, 2)
    ]
    (root / "jobs.json").write_text(json.dumps(made))
    command = [sys.executable, "-m", "tests.processes", str(root / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, job in json.loads(done.stdout).items():
        assert set(job["codes"]) == {0}, (name, job["stderr"])
    return root


@pytest.mark.skipif(os.name == "nt", reason="forks")
@pytest.mark.parametrize("task", SETS)
def test_two_ranks_follow_the_losses_and_metrics_of_one(jobs, task):
    one, two, other = (np.array(json.loads((jobs / f"{task}-{n}" / f"steps{r}.json").read_text())) for n, r in ((1, 0), (2, 0), (2, 1)))
    assert len(one) > 2
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(two, other)
    weights = [load_checkpoint(jobs / f"{task}{n}" / "exp" / "weights" / "last.pt").weights for n in (1, 2)]
    assert all(torch.allclose(weights[0][k].float(), weights[1][k].float(), rtol=1e-3, atol=1e-5) for k in weights[0])
    rows = []
    for n in (1, 2):
        with open(jobs / f"{task}{n}" / "exp" / "results.csv", newline="") as file:
            rows.append(list(csv.DictReader(file)))
    for ones, twos in zip(*rows, strict=True):
        for name, value in ones.items():
            assert float(twos[name]) == pytest.approx(float(value), rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("task", ["segment", "classify"])
def test_hyper_parameters_are_searched(worlds, tmp_path, task):
    given = flags(worlds, task, tmp_path, hyp=Hyperparameters(**HYP), epochs=1, evolve=2, name="search")
    folder = evolve(TrainConfig(**given), train)
    with open(folder / "evolve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert Hyperparameters.from_yaml(folder / "hyp_evolve.yaml") != Hyperparameters()


@pytest.mark.parametrize("task", SETS)
def test_the_doctor_examines_the_network(worlds, tmp_path, task, capsys):
    assert doctor.main([str(worlds / task / SETS[task][0]), "--out", str(tmp_path / "doctor"), "--imgsz", "64"]) == 0
    assert "1 of 1 pass" in capsys.readouterr().out
