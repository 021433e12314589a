"""Several processes on Gloo: the same losses and metrics as one, one end for all, restarts."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from models.checkpoints.checkpoint import load_checkpoint
from models.layers.attention.ops.shared import PooledBatchNorm2d
from tests.tiny_training import make_world
from utils import distributed
from utils.errors import UserError

ROOT = Path(__file__).parents[2]
HYP = {"warmup_epochs": 1, "warmup_min_iters": 0, "nbs": 32, "mixup": 0.5, "close_mosaic": 1}
PLAIN = {"lr0": 0.01, "warmup_epochs": 0, "nbs": 4, "mosaic": 0, "mixup": 0, "copy_paste": 0, "scale": 0, "translate": 0, "cls": 1.0}
ANCHORED = """
nc: 80
depth_multiple: 1.0
width_multiple: 1.0
anchors:
  - [10,10, 16,20, 30,30]
  - [40,20, 30,60, 60,60]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [[2, 3], 1, Detect, [nc, anchors]]
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks")


def flags(world: Path, project: Path, **changes) -> dict:
    given = {"cfg": "tiny-v9.yaml", "hyp": HYP, "imgsz": 64, "epochs": 4, "batch_size": 16, "workers": 0, "device": "cpu", "amp": "off"}
    given |= {"precise_bn": 0}  # ranks measure batches of their own
    given |= {"data": str(world / "data.yaml"), "project": str(project), "noplots": True, "seed": 3} | changes
    return given | {"cfg": str(world / given["cfg"])} if not given.get("resume") else changes


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """33 images are two batches of 16 and a last one that leaves one of two processes without; 87 are BCCD's validation images."""
    root = make_world(tmp_path_factory.mktemp("world"), train=33, val=87)
    (root / "tiny-v5.yaml").write_text(ANCHORED)
    return root


@pytest.fixture(scope="module")
def done(world, tmp_path_factory) -> SimpleNamespace:
    """All jobs, run by one process that forks the others."""
    root = tmp_path_factory.mktemp("jobs")
    jobs = []
    for head, n in (("v9", 1), ("v9", 2), ("v5", 1), ("v5", 2)):
        config = flags(world, root / f"{head}{n}", cfg=f"tiny-{head}.yaml", epochs=4 if head == "v9" else 3, noval=head == "v5")
        jobs += [{"name": f"{head}-{n}", "kind": "train", "world": n, "frozen": True, "config": config}]
    plain = {"hyp": PLAIN, "epochs": 8, "batch_size": 4, "optimizer": "AdamW", "noval": True}
    jobs += [{"name": "fit", "kind": "train", "world": 1, "config": flags(world, root / "fit", **plain)}]
    common = ["--weights", str(root / "fit" / "exp" / "weights" / "best.pt"), "--data", str(world / "data.yaml"), "--imgsz", "64"]
    common += ["--device", "cpu", "--workers", "0", "--batch-size", "16", "--save-json", "--save-txt", "--save-conf"]
    jobs += [{"name": f"val-{n}", "kind": "val", "world": n, "flags": [*common, "--project", str(root / f"val{n}")]} for n in (1, 2, 3)]
    failing = {"kind": "failing", "at": 1}
    jobs += [{**failing, "name": f"kill-{r}", "how": "kill", "world": 2, "rank": r, "config": flags(world, root / f"k{r}")} for r in (0, 1)]
    jobs += [{**failing, "name": "error", "how": "error", "world": 3, "rank": 2, "config": flags(world, root / "e", batch_size=15)}]
    jobs += [{"name": "wrong", "kind": "train", "world": 2, "config": flags(world, root / "n", data="/nowhere.yaml")}]
    jobs += [{"name": "sync-bn", "kind": "train", "world": 2, "config": flags(world, root / "s", sync_bn=True)}]
    noisy = {"cfg": "noisy-v9.yaml", "plugins": [str(world / "noisy.py")], "epochs": 2, "save_steps": 1, "batch_size": 8, "noval": True}
    jobs += [{"name": "whole", "kind": "train", "world": 2, "config": flags(world, root / "whole", **noisy)}]
    jobs += [{**failing, "name": "cut", "how": "kill", "at": 3, "rank": 1, "world": 2, "config": flags(world, root / "cut", **noisy)}]
    last = root / "cut" / "exp" / "weights" / "last.pt"
    jobs += [{"name": "resumed", "kind": "train", "world": 2, "config": flags(world, root, resume=str(last), plugins=noisy["plugins"])}]
    (root / "jobs.json").write_text(json.dumps(jobs))
    run = [sys.executable, "-m", "tests.processes", str(root / "jobs.json")]
    ran = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=3600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return SimpleNamespace(root=root, jobs=json.loads(ran.stdout))


def lines(job: dict) -> list[str]:
    """What the processes said, without progress bars."""
    said = "\n".join(job["stderr"]).replace("\r", "\n").splitlines()
    return [line for line in said if line.strip() and "%|" not in line and "0it" not in line]


@pytest.mark.parametrize("head", ["v9", "v5"])
def test_two_ranks_follow_the_losses_of_one(done, head):
    assert (done.jobs[f"{head}-1"]["codes"], done.jobs[f"{head}-2"]["codes"]) == ([0], [0, 0])
    one, two, other = (np.array(json.loads((done.root / name).read_text())) for name in
                       (f"{head}-1/steps0.json", f"{head}-2/steps0.json", f"{head}-2/steps1.json"))  # fmt: skip
    assert len(one) == {"v9": 12, "v5": 9}[head]
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(two, other)
    weights = [load_checkpoint(done.root / f"{head}{n}" / "exp" / "weights" / "last.pt").weights for n in (1, 2)]
    assert all(torch.allclose(weights[0][k].float(), weights[1][k].float(), rtol=1e-3, atol=1e-5) for k in weights[0])
    texts = [(done.root / f"{head}{n}" / "exp" / "results.csv").read_text() for n in (1, 2)]
    rows = [list(csv.DictReader(text.splitlines())) for text in texts]
    for a, b in zip(*rows):
        assert all(float(b[k]) == pytest.approx(float(a[k]), rel=1e-3, abs=1e-5) for k in a if "loss" in k and a[k])


def test_all_ranks_have_the_same_ema_at_every_validation(done):
    assert json.loads((done.root / "v9-2" / "same1.json").read_text()) == [True] * 4


@pytest.mark.parametrize("processes", [2, 3])
def test_sharded_validation_equals_one_process_bit_for_bit(done, processes):
    assert done.jobs[f"val-{processes}"]["codes"] == [0] * processes
    one = torch.load(done.root / "val-1" / "metrics0.pt", weights_only=False)
    assert one["images"] == 87
    assert 0.1 < one["map"] < 0.99
    for rank in range(processes):
        assert_same(one, torch.load(done.root / f"val-{processes}" / f"metrics{rank}.pt", weights_only=False))
    files = [sorted(p for p in (done.root / f"val{n}").rglob("*") if p.suffix in (".txt", ".json")) for n in (1, processes)]
    assert [p.name for p in files[0]] == [p.name for p in files[1]]
    for a, b in zip(*files):
        assert sorted(map(str, json.loads(a.read_text()))) == sorted(map(str, json.loads(b.read_text()))) if a.suffix == ".json" else True
        assert a.suffix == ".json" or a.read_text() == b.read_text()


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
    if isinstance(a, (dict, tuple)):
        for x, y in zip(a.values(), b.values()) if isinstance(a, dict) else zip(a, b):
            assert_same(x, y)
    else:
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_other_with_one_line(done, rank):
    job = done.jobs[f"kill-{rank}"]
    assert job["codes"] == [-signal.SIGKILL if r == rank else 1 for r in (0, 1)]
    (line,) = lines(job)
    assert line.startswith(f"train.py: process {rank} of 2 was lost")
    assert "holds 0 of 4 epochs, resume with --resume" in line


def test_error_of_one_rank_ends_all_with_its_message(done):
    job = done.jobs["error"]
    assert job["codes"] == [1, 1, 1]
    (line,) = lines(job)
    assert line.startswith("train.py: the disk of this one is gone; ")


def test_error_of_all_ranks_is_printed_once(done):
    assert done.jobs["wrong"]["codes"] == [1, 1]
    (line,) = lines(done.jobs["wrong"])
    assert line.startswith("train.py: dataset file /nowhere.yaml not found")


def test_sync_bn_is_refused_on_cpus_and_ignored_for_one_process(done, capsys):
    (line,) = lines(done.jobs["sync-bn"])
    assert line.startswith("train.py: --sync-bn: torch synchronises batch norms between GPUs only")
    distributed.convert_sync_batchnorm(torch.nn.BatchNorm2d(2), torch.device("cpu"))
    assert "one process" in capsys.readouterr().out


def test_sync_bn_converts_only_batch_norms(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Sequential(PooledBatchNorm2d(4))).eval()
    before, images = dict(model.state_dict(keep_vars=True)), torch.rand(2, 3, 5, 5)
    expected = model(images)
    distributed.convert_sync_batchnorm(model, torch.device("cuda"))
    assert [type(m).__name__ for m in (model[1], model[2][0])] == ["SyncBatchNorm", "PooledBatchNorm2d"]
    after = model.state_dict(keep_vars=True)
    assert list(before) == list(after)
    assert all(before[k] is after[k] for k in before)
    assert torch.equal(model(images), expected)


def test_two_processes_resume_within_an_epoch_bit_for_bit(done):
    assert [done.jobs[name]["codes"] for name in ("whole", "cut", "resumed")] == [[0, 0], [1, -signal.SIGKILL], [0, 0]]
    assert "holds 0 of 2 epochs and 3 of 5 batches of the next" in lines(done.jobs["cut"])[-1]
    whole, resumed = (done.root / name / "exp" for name in ("whole", "cut"))
    a, b = (load_checkpoint(folder / "weights" / "last.pt").weights for folder in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (whole / "results.csv").read_text() == (resumed / "results.csv").read_text()


def test_incomplete_distributed_environment_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 but no .*MASTER_ADDR.* start .* with torchrun"), distributed.watch_ranks():
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE=two in the environment: a number is needed"):
        distributed.world_size()


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_restart_resumes_in_the_same_folder(world, tmp_path, rank):
    given = flags(world, tmp_path / "runs", batch_size=8)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    command += [str(ROOT / "train.py"), "--noplots", "--save-steps", "1", "--epochs", "30", "--batch-size", "8", "--workers", "1"]
    for name in ("cfg", "data", "project", "imgsz", "device"):
        command += [f"--{name}", str(given[name])]
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True, cwd=tmp_path)
    table = tmp_path / "runs" / "exp" / "results.csv"
    while agent.poll() is None and not (table.exists() and len(table.read_text().splitlines()) > 2):
        time.sleep(0.05)
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(agent.pid).children()}
    ranks[rank].kill()
    said = agent.communicate(timeout=1800)[0]
    assert agent.returncode == 0
    assert "This job was started again; its run is" in said
    assert "Resuming " in said
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["exp"]
    assert len(table.read_text().splitlines()) == 31
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]


@pytest.mark.slow
def test_two_machines_train_the_same_weights_as_one(world, tmp_path):
    """Two agents that meet at a rendezvous, each in a folder that only it sees, and one agent with two processes."""
    given = flags(world, Path("runs"), batch_size=8)
    script = [str(ROOT / "train.py"), "--noplots", "--epochs", "1", "--batch-size", "8", "--workers", "0"]
    for name in ("cfg", "data", "project", "imgsz", "device"):
        script += [f"--{name}", str(given[name])]
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"localhost:{free.getsockname()[1]}"
    meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_id", tmp_path.name]
    jobs = {"alone": ["--standalone", "--nproc_per_node", "2"], "first": meeting, "second": meeting}
    agents = []
    for name, launch in jobs.items():
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", *launch, *script]
        agents.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path / name))
    said = [agent.communicate(timeout=1800)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0, 0], said
    saved = [name for name in jobs if (tmp_path / name / "runs").exists()]
    assert len(saved) == 2  # of the two machines only that of the main process has the run's folder, or any
    assert saved[0] == "alone"
    assert all([p.name for p in (tmp_path / name / "runs").iterdir()] == ["exp"] for name in saved)
    talkers = [name for name, text in zip(jobs, said) if "Best epoch" in text]
    assert talkers == saved
    one, two = (tmp_path / name / "runs" / "exp" for name in saved)
    assert (one / "results.csv").read_text() == (two / "results.csv").read_text()
    a, b = (load_checkpoint(folder / "weights" / "last.pt").weights for folder in (one, two))
    assert all(torch.equal(a[k], b[k]) for k in a)
