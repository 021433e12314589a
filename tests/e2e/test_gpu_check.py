"""The GPU check runs end to end at a tiny size on a CPU, and what cannot run is a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.gpu import check as script
from benchmarks.gpu import networks
from benchmarks.gpu.common import TINY, Check, Sizes
from benchmarks.gpu.networks import OurStep, PeerStep, synthetic_batch, waiting_lines
from benchmarks.gpu.trainings import counts
from tests.contract import test_attention_contract as attention
from tests.tiny_training import make_world
from tests.unit.models import test_export_files as exports

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "check.py"
RUN = ("train-fp32", "train-fp16", "train-bf16", "throughput", "waits", "latency", "attention", "resume", "loader")


def checked(folder: Path, *arguments: str) -> tuple[dict[str, list[dict]], str]:
    """Rows by step, and what was printed."""
    command = [sys.executable, str(SCRIPT), "--out", str(folder / "out"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p.name for p in (folder / "out").iterdir()} <= {"results.json", "table.txt", "check.log"}
    rows: dict[str, list[dict]] = {}
    for row in json.loads((folder / "out" / "results.json").read_text())["rows"]:
        rows.setdefault(row["step"], []).append(row)
    return rows, done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_every_step_writes_rows(tmp_path):
    world = make_world(tmp_path / "world")
    given = ("--data", str(world / "data.yaml"), "--cfg", str(world / "tiny-v9.yaml"))
    rows, said = checked(tmp_path, "--tiny", *given, "--seconds", "800", "--only", *RUN, "compile")
    log = (tmp_path / "out" / "check.log").read_text()[-4000:]
    for step in RUN[:1] + RUN[2:]:
        ours = [row for row in rows[step] if not row.get("side", "").startswith("peer")]
        assert [row["status"] for row in ours] == ["ok"] * len(ours), (rows[step], log)
        assert f"## {step}" in said
    assert "needs a GPU" in rows["train-fp16"][0]["reason"]
    assert rows["train-bf16"][0]["largest_gap"] < 0.2
    assert rows["train-bf16"][0]["non_finite"] == 0
    assert rows["resume"][0]["bit_equal"]
    assert all(row["difference"] < 1e-3 for row in rows["attention"])
    assert rows["compile"][0]["status"] == "skipped"
    assert [row["name"] for row in rows["loader"]] == ["loader alone", str(world / "tiny-v9.yaml")]
    assert all(row["images_s"] > 0 for row in rows["loader"])


def test_all_networks_are_compiled_too():
    assert {name for name, _ in Sizes().networks} == set(Sizes().compiled)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_exceeded_time_is_reported_as_a_row(tmp_path):
    rows, _ = checked(tmp_path, "--tiny", "--seconds", "1", "--only", "throughput", "latency")
    assert [row["reason"] for step in rows.values() for row in step] == ["no time left"] * 2


def test_a_missing_data_set_ends_the_check_before_any_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check.py", "--tiny", "--data", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "out")])
    assert script.main() == 2
    said = capsys.readouterr().err
    assert "none.yaml" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_synchronising_lines_are_named():
    def step() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally ...)", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    (line,) = waiting_lines(step, torch.device("cpu"))
    assert line.startswith("tests/e2e/test_gpu_check.py:")
    assert line.endswith("stacklevel=1)")


def test_last_line_of_pytest_is_parsed():
    assert counts("2 failed, 76 passed, 900 deselected in 31.2s") == {"passed": 76, "failed": 2, "skipped": 0, "error": 0}


@pytest.fixture
def check(tmp_path) -> Iterator[Check]:
    before = kernels()
    yield Check("throughput", TINY, "", tmp_path, tmp_path / "rows.jsonl", 0.0)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def kernels() -> tuple[bool, bool, bool]:
    return torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def test_our_step_is_the_one_of_the_training_script(check, monkeypatch):
    """Its kernels, the colour and flips that a GPU does, and --compile for network and loss."""
    compiled, finished = [], []
    monkeypatch.setattr(networks, "compile_network", lambda model, *_, **__: compiled.append(model) or True)
    monkeypatch.setattr(networks, "compile_loss", lambda loss, *_, **__: compiled.append(loss))
    batch = synthetic_batch(2, 64)
    step = OurStep(check, "yolov8n.yaml", batch, compiled=True)
    assert kernels() == (True, True, True)
    assert compiled == [step.model, step.step.state.loss]
    monkeypatch.setattr("engine.training.step.finished", lambda given: finished.append(given.finish) or given)
    step()
    assert finished[0].tables.shape == (2, 3, 256)
    assert finished[0].flips.shape == (2, 2)


@pytest.mark.usefixtures("exact_float32")
def test_devices_are_compared_without_tensorfloat32():
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    for test in (attention.test_cuda_agrees_and_trains_in_half_precision, exports.test_torchscript_runs_on_a_gpu):
        assert "exact_float32" in {name for mark in test.pytestmark if mark.name == "usefixtures" for name in mark.args}


def test_all_tests_that_need_a_gpu_are_among_those_of_the_check():
    mark = "@pytest.mark." + "gpu"
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if mark in path.read_text(encoding="utf-8")]
    assert len(files) > 2
    covered = [ROOT / name for name in Sizes().tests]
    assert [path for path in files if not any(path.is_relative_to(place) for place in covered)] == []


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled")
def test_peer_is_trained_channels_last_on_a_gpu_with_kernels_of_its_own(check, monkeypatch):
    class Network(nn.Linear):
        def __init__(self, *_, **__) -> None:
            super().__init__(1, 1)

        def to(self, *args, **options):
            self.asked = (*args, options)
            return self

    monkeypatch.setattr(networks, "_peer", lambda: (lambda overrides: overrides, Network, lambda model: model))
    for device, layout in (("cuda", torch.channels_last), ("cpu", torch.contiguous_format)):
        monkeypatch.setattr(Check, "device", torch.device(device))
        step = PeerStep(check, "yolov8n.yaml", synthetic_batch(2, 64))
        assert step.model.asked == (torch.device(device), {"memory_format": layout})
        assert step.images.is_contiguous()
    assert kernels() == (False, True, False)
