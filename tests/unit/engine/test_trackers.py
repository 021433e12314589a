"""MLflow and Weights & Biases are told what results.csv holds; a missing package is a line, a failing one does not stop a run."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from engine.logging.callbacks import Callbacks, RunInfo
from engine.logging.trackers import trackers
from tasks import DETECT
from utils.cli.train_arguments import parse_arguments
from utils.config import TrainConfig
from utils.errors import UserError

ROWS = ({"epoch": 0, "metrics/mAP_0.5:0.95": 0.25}, {"epoch": 1, "metrics/mAP_0.5:0.95": 0.5})


class Recorder:
    """Takes the place of a package: remembers what was called, with what."""

    def __init__(self, *, broken: str = "") -> None:
        self.calls, self.broken = [], broken
        self.id, self.info = "run-7", SimpleNamespace(run_id="run-7")

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name == self.broken:
                raise ConnectionError("no server")
            return self

        return call

    def named(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def log_run(folder, name, values, *, rows=()):
    """A run of two epochs, or the rest of one."""
    callbacks = Callbacks(trackers([name], "runs/train", values))
    (folder / "results.csv").write_text("epoch")
    callbacks.on_train_start(RunInfo(folder, ("a",), ("box",), DETECT, len(rows), rows))
    for row in ROWS[len(rows) :]:
        callbacks.on_epoch_end(RunInfo(folder, ("a",), ("box",), DETECT), row)
    callbacks.on_train_end(RunInfo(folder, ("a",), ("box",), DETECT))


def test_mlflow_records_parameters_metrics_and_artifacts(tmp_path, monkeypatch):
    mlflow = Recorder()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    log_run(tmp_path, "mlflow", {f"key{i}": "x" * 1000 for i in range(120)})
    parameters = [args[0] for args, _ in mlflow.named("log_params")]
    assert [len(p) for p in parameters] == [50, 50, 20]
    assert all(len(v) <= 250 for p in parameters for v in p.values())
    assert mlflow.named("log_metrics") == [(({"metrics/mAP_0.5-0.95": v},), {"step": i}) for i, v in enumerate((0.25, 0.5))]
    assert mlflow.named("log_artifact") == [((str(tmp_path / "results.csv"),), {})]
    assert mlflow.named("end_run")
    again = Recorder()
    monkeypatch.setitem(sys.modules, "mlflow", again)
    log_run(tmp_path, "mlflow", {"key": 1}, rows=ROWS[:1])
    assert again.named("start_run") == [((), {"run_id": "run-7"})]
    assert not again.named("log_params")
    assert [kwargs["step"] for _, kwargs in again.named("log_metrics")] == [0, 1]


def test_wandb_records_config_metrics_and_artifacts(tmp_path, monkeypatch):
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log_run(tmp_path, "wandb", {"lr0": 0.01})
    ((_, given),) = wandb.named("init")
    assert given["project"] == "runs-train"  # no slash may be in it
    assert (given["name"], given["config"], given["id"]) == (tmp_path.name, {"lr0": 0.01}, None)
    assert wandb.named("log") == [(({"metrics/mAP_0.5:0.95": v},), {"step": i}) for i, v in enumerate((0.25, 0.5))]
    assert wandb.named("save")
    assert wandb.named("finish")
    log_run(tmp_path, "wandb", {}, rows=ROWS[:1])
    assert wandb.named("init")[1][1]["id"] == "run-7"


@pytest.mark.parametrize(("name", "broken"), [("mlflow", "start_run"), ("mlflow", "log_metrics"), ("wandb", "init"), ("wandb", "finish")])
def test_failing_tracker_is_removed(tmp_path, monkeypatch, capsys, name, broken):
    package = Recorder(broken=broken)
    monkeypatch.setitem(sys.modules, name, package)
    log_run(tmp_path, name, {})
    assert capsys.readouterr().err.count("failed (ConnectionError: no server) and is left out from now on") == 1
    assert package.calls[-1][0] == broken


def test_missing_package_and_unknown_tracker_are_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--logger wandb: the package wandb .*pip install wandb"):
        trackers(["wandb"], "runs", {})
    with pytest.raises(UserError, match=r"--logger comet: one of mlflow, wandb is needed; results\.csv"):
        TrainConfig(logger="comet")
    assert parse_arguments(["--logger", "MLflow", "wandb", "mlflow"]).logger == ("mlflow", "wandb")
