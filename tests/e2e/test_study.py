"""Studies end to end: killed and continued, and as a user starts one."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import study
from engine.logging.callbacks import Callback
from engine.study.run_files import read_json, read_table
from tests.tiny_training import config, make_world
from train import train

ROOT = Path(__file__).parents[2]
FAILING = """
import torch
from torch import nn
from models.spec import channel_rules as rules
from models.spec.registry import register

@register("FailsForTests", channels=rules.same_width)
class FailsForTests(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("broken on purpose")
        return self.conv(x)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, and end with their parent")
def test_study_killed_three_times_ends_with_the_same_table(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tests.study_kills", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["repeated"] == []
    assert told["finished_before"] >= 2
    whole, cut = (json.loads((tmp_path / name / "table.json").read_text()) for name in ("whole", "cut"))
    assert cut == whole
    assert [row[:3] for row in whole] == [[v, s, "finished"] for v in ("none", "MHSA@3") for s in (0, 1)]
    losses = [tuple(row[4]["train/box_loss"]) for row in whole]
    assert len(set(losses)) == 4  # variants and seeds are different trainings
    assert all(len(loss) == 2 for loss in losses)


def test_study_from_the_command_line(tmp_path, monkeypatch):
    world = make_world(tmp_path / "world")
    file, plugin = world / "tiny.yaml", world / "fails.py"
    file.write_text(
        "cfg: tiny-v9.yaml\nattention: [MHSA@3, none, FailsForTests@3]\nbaseline: none\nseeds: [0]\ndata: data.yaml\nepochs: 1\nimgsz: 64\n"
        "batch_size: 4\nworkers: 0\nlatency: 3\njobs: 2\ndevices: cpu\nplugins: [fails.py]\ntrain: {noplots: true}\n"
    )
    plugin.write_text(FAILING)
    command = [sys.executable, str(ROOT / "study.py"), "tiny.yaml", "--project", str(tmp_path / "studies")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    folder = tmp_path / "studies" / "tiny"
    assert "MHSA@3 and none\n    + row 4: MHSA []" in first.stdout
    assert "3 of 3 runs, 1 of them failed" in first.stdout
    (failed,) = (line for line in first.stdout.splitlines() if line.startswith("failed FailsForTests@3 seed 0: "))
    (log,) = (folder / "runs" / "FailsForTests@3-seed0").glob("train-*.log")
    assert f": fails.py, line 15: RuntimeError: broken on purpose; traceback in {log}" in failed
    assert "in forward" in log.read_text()
    for name in ("none-seed0", "MHSA@3-seed0"):
        run = folder / "runs" / name
        found = read_json(run / "study_metrics.json")
        assert set(found["metrics"]) == {"metrics/precision", "metrics/recall", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95"}
        assert set(found["per_class"]) == {"dark", "bright"}
        assert {len(curve) for curve in found["pr_curves"].values()} == {1001}
        assert len(read_table(run / "results.csv")["epoch"]) == len(read_json(run / "cost.json")["epoch_seconds"]) == 1
        assert (run / "weights" / "best.pt").is_file()
        assert (run / "detections.npz").is_file()
    assert set(read_json(folder / "latency.json")["latency_ms"]) == set(read_json(folder / "costs.json"))
    again = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "trains" not in again.stdout
    plugin.write_text(FAILING.replace("if self.training and", "if self.training and not"))
    mended = subprocess.run([*command, "--retry"], cwd=world, env=environment, capture_output=True, text=True)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert [line for line in mended.stdout.splitlines() if line.startswith("trains")] == ["trains FailsForTests@3 seed 0 on cpu"]
    studied = table(folder)
    assert len(studied) == 3
    monkeypatch.setattr("engine.study.report._draw", lambda *_: [])  # figures take seconds, and were drawn above
    for name in ("report", "report2"):
        study.main(["--report", str(folder), "--project", str(tmp_path / "studies")])
        assert table(tmp_path / "studies" / name) == studied
    assert study.main(["--report", str(world / "images"), "--project", str(tmp_path / "studies")]) == 1
    assert not (tmp_path / "studies" / "report3").exists()


def table(folder: Path) -> list[dict[str, str]]:
    """The runs of a report in their order, with the compared metric and what does not depend on where the report is made."""
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key != "folder"} for row in csv.DictReader(file)]


class Seen(Callback):
    """Notes the images of every batch, and a checksum of their pixels."""

    def __init__(self) -> None:
        self.batches: list[tuple] = []

    def on_batch(self, run, epoch, iteration, batch) -> None:
        self.batches.append((epoch, iteration, tuple(batch.paths), int(batch.images.long().sum()), len(batch.targets)))


def test_order_and_augmentation_of_the_data_do_not_depend_on_the_network(tmp_path):
    world = make_world(tmp_path / "world")
    seen = {}
    for name, changes in {
        "plain": {},
        "noisy": {"cfg": world / "noisy-v9.yaml", "plugins": world / "noisy.py"},  # draws random numbers in training
        "attention": {"attention": ("BoT3@3", "ConvControl@2")},
    }.items():
        callback = Seen()
        train(config(world, tmp_path / name, epochs=2, **changes), callbacks=[callback])
        seen[name] = callback.batches
    assert len(seen["plain"]) == 6
    assert seen["noisy"] == seen["plain"]
    assert seen["attention"] == seen["plain"]
