"""How a study starts trainings, what it reads of their ends, and what a run folder says of its costs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import study
from engine.logging.cost import COST_FILE, CostLogger
from engine.study import processes
from engine.study.processes import TrainingProcess, arguments, reason_in, starter
from engine.study.records import Status
from engine.study.run_files import Job, Stop, note_failure, read_record, read_table, write_json
from utils.cli.study_arguments import StudyConfig
from utils.cli.train_arguments import parse_arguments
from utils.config import TrainConfig
from utils.errors import UserError


@pytest.fixture
def job(tmp_path):
    folder = tmp_path / "runs" / "a-seed0"
    folder.mkdir(parents=True)
    return Job("a", 0, folder, {"epochs": 3, "cfg": "a.yaml", "plugins": ("mine.py",)})


@pytest.fixture
def started(monkeypatch):
    """The commands and environments of processes that are started; each ends at once, well."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def start(command, env, **_):
        calls.append((command, env))
        return SimpleNamespace(poll=lambda: 0, wait=lambda seconds: 0)

    monkeypatch.setattr(processes.subprocess, "Popen", start)
    return calls


def test_command_line_of_a_training_gives_its_flags_back():
    flags = {"cfg": "a.yaml", "imgsz": 320, "freeze": (3, 4), "cos_lr": True, "seed": 7, "plugins": ("a.py", "b.py")}
    config = parse_arguments(arguments(flags))
    assert {name: getattr(config, name) for name in flags} == flags
    assert config == TrainConfig(**flags)
    assert arguments({}) == []


def test_training_is_followed_by_its_measurement_or_resumed(job, started, monkeypatch):
    monkeypatch.setattr(processes, "is_trained", lambda job: len(started) == 1)
    training = TrainingProcess(job, device="0")
    assert training.poll() is None
    assert training.poll() == 0
    (train, _), (measurement, _) = started
    assert train[1].endswith("train.py")
    assert train[train.index("--device") + 1] == "0"
    assert measurement[1:] == ["-m", "engine.study.measuring", str(job.folder), "last", "0"]
    (job.folder / "weights").mkdir()
    job.last.touch()
    started.clear()
    monkeypatch.setattr(processes, "is_trained", lambda job: False)
    TrainingProcess(job, device="cpu")
    assert parse_arguments(started[0][0][2:]) == TrainConfig(resume=str(job.last), device="cpu", plugins=("mine.py",))


def test_training_waits_for_a_process_that_still_writes_the_folder(job, started, monkeypatch):
    free = iter([False, False, True])
    monkeypatch.setattr(processes, "_is_free", lambda folder: next(free))
    training = TrainingProcess(job, device="")
    assert (training.poll(), len(started)) == (None, 0)
    assert (training.poll(), len(started)) == (None, 1)


def test_restarted_job_does_not_resume_another_run(job, started, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 8)
    starter(jobs=4)(job, "")
    environment = started[0][1]
    assert "SLURM_RESTART_COUNT" not in environment
    assert environment["OMP_NUM_THREADS"] == "2"
    assert str(processes.ROOT) in environment["PYTHONPATH"].split(":")


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("epoch 1\ntrain.py: a.yaml: no such file\n", "a.yaml: no such file"),
        ("train.py: the first time\n$ python train.py --resume x\ntrain.py: the memory is full\n", "the memory is full"),
        ("$ python train.py\nthe last\n", "it ended, without a message; its last line: the last"),
        ("train.py: of the first try\n$ python train.py\n 0%|   | 0/4\n", "it ended, without a message"),
        ("loading\rstudy measurement: no such data", "no such data"),
        ("$ python train.py\n", "it ended, without a message"),
        ("", "it ended, without a message"),
    ],
)
def test_reason_of_a_failure_is_the_scripts_own_line(tmp_path, log, reason):
    (tmp_path / "train.log").write_text(log)
    assert reason_in(tmp_path / "train.log") == reason


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (137, "it ended with status 137, without a message"),
        (-9, "it was killed by SIGKILL, as the system does where memory is full, without a message"),
        (-11, "it was killed by SIGSEGV, without a message"),
    ],
)
def test_without_a_reason_it_is_said_how_the_training_ended(tmp_path, status, said):
    assert reason_in(tmp_path / "none.log", status=status) == said


def test_devices_take_trainings_in_turn():
    assert study.slots_of(StudyConfig()) == ("",)
    assert study.slots_of(StudyConfig(jobs=2)) == ("", "")
    assert study.slots_of(StudyConfig(devices="0,1")) == ("0", "1")
    assert study.slots_of(StudyConfig(devices="0, 1", jobs=3)) == ("0", "1", "0")


def test_device_that_is_not_there_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = SimpleNamespace(config=StudyConfig(devices="cpu,7"), folder=tmp_path / "study")
    with pytest.raises(UserError, match=r"^--devices 7: no CUDA device is available here; use --devices cpu$"):
        study.run_plan(plan)
    assert not plan.folder.exists()


def test_record_says_what_the_run_left(job):
    assert read_record(job).status is Status.PENDING
    (job.folder / "results.csv").write_text("epoch,metrics/mAP_0.5\n0,0.25\n1,\n2,0.")  # a row that is being written
    write_json(job.folder / COST_FILE, {"epoch_seconds": [1.5, 2.0], "peak_memory_mib": 100})
    record = read_record(job, stopped=Stop(2, "by the rule"))
    assert (record.status, record.reason) == (Status.STOPPED, "by the rule")
    assert record.curves["epoch"] == [0.0, 1.0]
    assert record.curves["metrics/mAP_0.5"][1] != record.curves["metrics/mAP_0.5"][1]
    assert (record.cost.training_seconds, record.cost.peak_memory_mib) == (3.5, 100.0)
    note_failure(job, "the disk is full")
    assert (read_record(job).status, read_record(job).reason) == (Status.FAILED, "the disk is full")
    write_json(job.folder / "study_metrics.json", {"compare": "last", "metrics": {"m": 0.5}, "per_size": {"small": float("nan")}})
    finished = read_record(job)
    assert (finished.status, finished.metrics) == (Status.FINISHED, {"m": 0.5})
    assert finished.per_size["small"] != finished.per_size["small"]
    (job.folder / "study_metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"study_metrics\.json: damaged"):
        read_record(job)
    assert read_table(job.folder / "nothing.csv") == {}


def test_cost_of_a_resumed_run_keeps_the_epochs_before(tmp_path):
    info = SimpleNamespace(save_dir=tmp_path, start_epoch=0)
    first = CostLogger()
    first.on_train_start(info)
    for _ in range(3):
        first.on_epoch_end(info, {})
    before = json.loads((tmp_path / COST_FILE).read_text())
    assert len(before["epoch_seconds"]) == 3
    assert before["peak_memory_mib"] > 10
    resumed = CostLogger()
    resumed.on_train_start(SimpleNamespace(save_dir=tmp_path, start_epoch=2))
    resumed.on_epoch_end(info, {})
    after = json.loads((tmp_path / COST_FILE).read_text())
    assert after["epoch_seconds"][:2] == before["epoch_seconds"][:2]
    assert len(after["epoch_seconds"]) == 3
    anew = CostLogger()
    anew.on_train_start(info)
    anew.on_epoch_end(info, {})
    assert len(json.loads((tmp_path / COST_FILE).read_text())["epoch_seconds"]) == 1


def test_only_one_process_runs_a_study(tmp_path, monkeypatch):
    plan = SimpleNamespace(config=StudyConfig(), folder=tmp_path)
    monkeypatch.setattr("utils.run_folders._lock", lambda descriptor: False)
    with pytest.raises(UserError, match="wait until it has ended, or stop it"):
        study.run_plan(plan)
