"""A training that was stopped, killed or torn, and went on, ends with the very weights of one that was left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train as script
from engine.logging.callbacks import Callback
from engine.training.resume import find_last_checkpoint
from models.checkpoints.checkpoint import load_checkpoint, previous_of
from tests.tiny_training import HYP, config, make_world
from train import train
from utils.cli.train_arguments import parse_arguments
from utils.config import TrainConfig
from utils.errors import UserError

ROOT = Path(__file__).parents[2]
# Several steps an epoch, two batches a step, sizes that change, a schedule in motion.
GIVEN = {"batch_size": 2, "multi_scale": True, "cos_lr": True, "optimizer": "AdamW", "hyp": HYP.replace(nbs=4, iou_loss="WIoU-v3")}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """The folder of a run that was left alone."""
    return train(config(world, tmp_path_factory.mktemp("whole"), **GIVEN)).save_dir


class Signal(Callback):
    """A signal to this process at a given step."""

    def __init__(self, epoch: int, iteration: int, number: int = signal.SIGINT, times: int = 1) -> None:
        self.when, self.number, self.times = (epoch, iteration), number, times

    def on_batch(self, run, epoch, iteration, batch) -> None:
        if (epoch, iteration) == self.when:
            for _ in range(self.times):
                signal.raise_signal(self.number)  # handled before it returns; os.kill may be handled later


def assert_equal_runs(a: Path, b: Path) -> None:
    for name in ("last.pt", "best.pt"):
        first, second = (load_checkpoint(folder / "weights" / name) for folder in (a, b))
        assert first.weights.keys() == second.weights.keys()
        assert all(torch.equal(first.weights[k], second.weights[k]) for k in first.weights), name
        for key in ("epoch", "fitness", "best_fitness", "metrics"):
            assert getattr(first, key) == getattr(second, key), (name, key)
    assert (a / "results.csv").read_text() == (b / "results.csv").read_text()
    assert {p.name for p in (b / "weights").iterdir()} == {"last.pt", "best.pt", "best-deploy.pt"}


def stopped(world: Path, folder: Path, *callbacks: Callback, **changes) -> Path:
    """last.pt of a run that callbacks stop."""
    with pytest.raises(KeyboardInterrupt, match="resume with --resume"):
        train(config(world, folder, **{**GIVEN, **changes}), callbacks=callbacks)
    return folder / "exp" / "weights" / "last.pt"


@pytest.mark.parametrize(("number", "place"), [(signal.SIGINT, (1, 2)), (signal.SIGTERM, (0, 3)), (signal.SIGINT, (1, 5))])
def test_interrupt_is_saved_after_its_step_and_resumes_there(world, whole, tmp_path, number, place):
    last = stopped(world, tmp_path, Signal(*place, number))
    saved = load_checkpoint(last)
    assert saved.epoch == place[0]
    assert place[1] < saved.training["batch"] <= place[1] + 2  # at most two batches a step
    torch.manual_seed(99)
    assert_equal_runs(whole, train(TrainConfig(resume=last)).save_dir)


def test_worker_count_changes_nothing_even_within_an_epoch(world, whole, tmp_path):
    for workers in (1, 3):
        last = stopped(world, tmp_path / str(workers), Signal(1, 2), workers=workers)
        result = train(TrainConfig(resume=last, workers=4 - workers))
        assert_equal_runs(whole, result.save_dir)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="workers cannot tell who sends a signal")
def test_only_the_main_process_handles_a_signal_to_the_process_group(world, whole, tmp_path):
    class Group(Callback):
        """What a batch system does: a SIGTERM to every process of the job."""

        def on_batch(self, run, epoch, iteration, batch) -> None:
            if (epoch, iteration) == (1, 0):
                pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
                assert len(pids) > 2
                subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)
                subprocess.run(["kill", "-INT", *map(str, pids[1:])], check=True)
                while not signal.getsignal(signal.SIGTERM).__self__.requested:  # until this process has handled its own
                    time.sleep(0.01)

    last = stopped(world, tmp_path, Group(), workers=2)
    assert load_checkpoint(last).training["batch"] == 2  # one more batch was drawn for the step
    assert_equal_runs(whole, train(TrainConfig(resume=last)).save_dir)


def test_second_signal_stops_immediately(world, whole, tmp_path):
    last = stopped(world, tmp_path, Signal(1, 2, times=2))
    assert (load_checkpoint(last).epoch, load_checkpoint(last).training["batch"]) == (1, 0)
    assert_equal_runs(whole, train(TrainConfig(resume=last)).save_dir)


def test_interrupt_during_validation_does_not_wait_for_its_end(world, whole, tmp_path, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(torch.rand(3))  # draws that a resume must not miss
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    import train as train_script

    evaluate = train_script.evaluate
    monkeypatch.setattr(train_script, "evaluate", interrupted)
    last = stopped(world, tmp_path)
    assert (load_checkpoint(last).epoch, load_checkpoint(last).training["batch"]) == (1, 6)
    assert_equal_runs(whole, train(TrainConfig(resume=last)).save_dir)


def test_save_steps_limits_the_loss_to_the_steps_since_the_last_save(world, whole, tmp_path):
    seen = []

    class Crash(Callback):
        def on_batch(self, run, epoch, iteration, batch) -> None:
            saved = load_checkpoint(run.save_dir / "weights" / "last.pt")
            seen.append((saved.epoch, saved.training["batch"]))
            if (epoch, iteration) == (1, 4):
                raise KeyboardInterrupt

    last = stopped(world, tmp_path, Crash(), save_steps=2)
    assert seen[-1][0] == 1
    assert seen[-1][1] > 0
    assert len({batch for _, batch in seen}) > 2
    assert_equal_runs(whole, train(TrainConfig(resume=last, save_steps=1)).save_dir)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: bytes(len(content)),
        lambda content: content[: len(content) // 2] + bytes(100) + content[len(content) // 2 + 100 :],
    ],
    ids=["half", "zeros", "middle"],
)
def test_truncated_file_is_never_resumed(world, whole, tmp_path, capsys, damage):
    last = stopped(world, tmp_path, Signal(1, 3), save_steps=1)
    previous = load_checkpoint(previous_of(last))
    last.write_bytes(damage(last.read_bytes()))
    (last.parent / ".last.123-7f.partial.pt").write_bytes(b"left by a killed save")
    with pytest.raises(UserError, match=r"last\.pt: "):
        load_checkpoint(last)
    result = train(TrainConfig(resume=last))
    said = capsys.readouterr()
    assert f"the save before it is complete: {previous_of(last)}" in said.err
    assert f"after {previous.epoch} of 3 epochs" in said.out
    assert_equal_runs(whole, result.save_dir)


def test_run_killed_while_finishing_is_completed_on_resume(world, whole, tmp_path, monkeypatch):
    def killed(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "finish_weights", killed)
    with pytest.raises(KeyboardInterrupt, match="holds 3 of 3 epochs, resume with"):
        train(config(world, tmp_path, **GIVEN))
    monkeypatch.undo()
    last = tmp_path / "exp" / "weights" / "last.pt"
    result = train(TrainConfig(resume=last))
    assert (result.last, result.epochs) == (None, 3)
    assert_equal_runs(whole, result.save_dir)
    assert load_checkpoint(last).training is None


def test_best_pt_is_restored_from_last_pt(world, whole, tmp_path, monkeypatch):
    """A kill between the two saves of an epoch."""

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.training.saving.save_copies", killed)
    last = stopped(world, tmp_path)
    assert not (last.parent / "best.pt").exists()
    monkeypatch.undo()
    assert_equal_runs(whole, train(TrainConfig(resume=last)).save_dir)


def test_early_stopped_run_is_not_resumed(world, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.training.early_stop.EarlyStop.is_due", lambda self, epoch: epoch >= 1)
    finish = script.finish_weights

    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "finish_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path, **GIVEN))
    monkeypatch.setattr(script, "finish_weights", finish)
    assert train(TrainConfig(resume=tmp_path / "exp")).epochs == 2


def test_resume_accepts_run_folder_weights_folder_or_file(world, tmp_path, monkeypatch):
    weights = tmp_path / "runs" / "exp" / "weights"
    with pytest.raises(UserError, match=r"no run in .*; start one without --resume"):
        find_last_checkpoint("newest", str(tmp_path / "runs"))
    weights.mkdir(parents=True)
    for given in ("newest", str(weights), str(weights.parent)):
        with pytest.raises(UserError, match="exp was stopped before its first save; start it again"):
            find_last_checkpoint(given, str(tmp_path / "runs"))
    previous_of(weights / "last.pt").touch()
    assert find_last_checkpoint("newest", str(tmp_path / "runs")) == weights / "last.pt"
    newer = tmp_path / "runs" / "exp2" / "weights"
    newer.mkdir(parents=True)
    os.utime(newer, (2**31, 2**31))
    with pytest.raises(UserError, match="exp2 was stopped before"):
        find_last_checkpoint("newest", str(tmp_path / "runs"))


def test_flags_given_with_resume_count_even_at_default_values(world, tmp_path):
    from engine.training.resume import load_resumed_run

    last = stopped(world, tmp_path, Signal(0, 1), patience=7, workers=0)
    config_anew, _ = load_resumed_run(parse_arguments(["--resume", str(last), "--patience", "100", "--workers", "8"]))
    assert (config_anew.patience, config_anew.workers, config_anew.epochs) == (100, 8, 3)
    with pytest.raises(UserError, match="--epochs with --resume: would make it another run"):
        load_resumed_run(parse_arguments(["--resume", str(last), "--epochs", "100"]))


def test_changed_data_restart_the_epoch_with_a_message(world, tmp_path, capsys):
    mine = make_world(tmp_path / "mine")
    last = stopped(mine, tmp_path, Signal(1, 2))
    (mine / "images" / "train" / "3.png").unlink()
    assert train(TrainConfig(resume=last)).epochs == 3
    said = capsys.readouterr().err
    assert "the data have changed, 12 images in 6 batches then, 11 images in 6 batches now: epoch 2 starts from its first batch" in said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@pytest.mark.parametrize("kills", [pytest.param(2, id="2"), pytest.param(20, id="20", marks=pytest.mark.slow)])
def test_resume_after_kill_gives_identical_weights(world, tmp_path, kills):
    hyp = HYP.replace(nbs=4).to_dict()
    where = {"cfg": str(world / "tiny-v9.yaml"), "data": str(world / "data.yaml"), "project": str(tmp_path), "hyp": hyp}
    size = {"imgsz": 64, "epochs": 2 + kills // 2, "batch_size": 2, "workers": 2, "save_steps": 1, "multi_scale": True}
    flags = {**where, **size, "device": "cpu", "noplots": True, "seed": 3}
    plan = {"config": flags, "kills": kills, "seed": int(os.environ.get("KILL_SEED", "0"))}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "tests.process_kills", str(tmp_path / "plan.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(found)
    assert (found["kills"], found["corrupt"], found["ended"], found["orphans"]) == (kills, [], 0, []), done.stderr[-2000:]
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
