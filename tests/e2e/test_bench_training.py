"""benchmarks/bench_training.py trains what is missing: not what is finished or another process trains, but what was interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from utils.run_folders import RunLock
with RunLock() as lock:
    lock.take(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_training

    return bench_training


def test_only_missing_runs_are_trained(bench, tmp_path, monkeypatch, capsys):
    outcome = {"scores": {"best": {"mAP@0.5": 0.25}}, "processor": 1.0, "wall": 2.0}
    finished, interrupted, running = (tmp_path / f"ours-yolov8n-{seed}" for seed in range(3))
    for folder in (finished, interrupted / "run", running):
        folder.mkdir(parents=True)
    (finished / "outcome.json").write_text(json.dumps(outcome))
    for left in (interrupted / "hyp.yaml", interrupted / "run" / "results.csv", running / "hyp.yaml"):
        left.write_text("")
    trained = []

    def train(args, job, folder):
        trained.append(job.name)
        assert [entry.name for entry in folder.iterdir()] == [".lock"]  # nothing is left of the interrupted one
        return outcome

    monkeypatch.setattr(bench, "_train", train)
    words = ["--data", "a.yaml", "--hyp", "h.yaml", "--out", str(tmp_path), "--cfg", "yolov8n.yaml", "--seeds", "0", "1", "2", "3"]
    monkeypatch.setattr(sys, "argv", ["bench_training.py", *words])
    with subprocess.Popen([sys.executable, "-c", HOLD, str(running)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        bench.main()
        other.kill()
    assert trained == ["ours-yolov8n-1", "ours-yolov8n-3"]
    assert json.loads((interrupted / "outcome.json").read_text()) == outcome
    assert "3 seeds" in capsys.readouterr().out
    bench.main()  # the other process was killed
    assert trained[2:] == ["ours-yolov8n-2"]
