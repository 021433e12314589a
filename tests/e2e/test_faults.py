"""What happens to a training when the machine, the disk or the data let it down: one clear line, nothing harmed, and it can go on."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from engine.logging.callbacks import Callback
from engine.training.nonfinite_guard import NonFiniteGuard
from models.checkpoints.checkpoint import load_checkpoint
from tests.tiny_training import HYP, config, make_world
from train import train
from utils.config import TrainConfig
from utils.errors import UserError

GIVEN = {"batch_size": 2, "hyp": HYP.replace(nbs=2)}  # six steps an epoch


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of a run to which nothing happened."""
    return weights_of(train(config(world, tmp_path_factory.mktemp("whole"), **GIVEN)).save_dir)


class At(Callback):
    """Does something at a given step."""

    def __init__(self, epoch: int, iteration: int, act) -> None:
        self.when, self.act = (epoch, iteration), act

    def on_batch(self, run, epoch, iteration, batch) -> None:
        if (epoch, iteration) == self.when:
            self.act(run)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "weights" / "last.pt").weights


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def failed(world: Path, folder: Path, says: str, *callbacks: Callback, **changes) -> Path:
    """last.pt of a run that ends with one line that says this, and how to go on."""
    with pytest.raises(UserError, match=says + r".*, resume with --resume ") as caught:
        train(config(world, folder, **{**GIVEN, **changes}), callbacks=callbacks)
    assert "\n" not in str(caught.value)
    return folder / "exp" / "weights" / "last.pt"


def test_disk_full_keeps_the_previous_save(world, whole, tmp_path):
    """No file may grow beyond so many bytes, which is what a full disk looks like to a program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = At(1, 1, lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1])))
    try:
        last = failed(world, tmp_path, r"last\.pt: cannot be saved \(File too large\); the previous one is intact", full, save_steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (load_checkpoint(last).epoch, load_checkpoint(last).training["batch"]) == (1, 0)
    assert not list(last.parent.glob(".*"))
    assert equal(whole, weights_of(train(TrainConfig(resume=last)).save_dir))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that nobody can write")
def test_read_only_folder_ends_the_run(world, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"/proc/runs: cannot be written \(.*\); give another --project"):
        train(config(world, Path("/proc/runs")))
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "opt.yaml").mkdir()  # a file that cannot be written
    with pytest.raises(UserError, match=r"exp: cannot be written \(Is a directory\)"):
        train(config(world, tmp_path, exist_ok=True))


def test_a_folder_that_becomes_read_only_keeps_its_last_save(world, whole, tmp_path, monkeypatch):
    real = os.replace

    def refuse(source, target):
        if str(target).endswith("last.pt"):
            raise OSError(30, "Read-only file system")
        real(source, target)

    broken = At(1, 3, lambda run: monkeypatch.setattr("os.replace", refuse))
    last = failed(world, tmp_path, r"last\.pt: cannot be saved \(Read-only file system\); the previous one is intact", broken)
    monkeypatch.undo()
    assert load_checkpoint(last).epoch == 1
    assert equal(whole, weights_of(train(TrainConfig(resume=last)).save_dir))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_unmounted_within_an_epoch_ends_the_run(tmp_path, whole, monkeypatch, workers):
    monkeypatch.setattr("data.loader.RECENT_BYTES", 0)  # nothing stays in memory
    world = make_world(tmp_path / "disk")
    images = world / "images"
    gone = At(1, 1, lambda run: images.rename(world / "elsewhere"))
    last = failed(world, tmp_path, "the folder of .* is gone; is its disk still mounted", gone, workers=workers, save_steps=1)
    saved = load_checkpoint(last)
    assert saved.epoch == 1
    assert saved.training["batch"] in range(1, 7)  # what workers had drawn before is trained on
    (world / "elsewhere").rename(images)
    assert equal(whole, weights_of(train(TrainConfig(resume=last)).save_dir))


def test_few_missing_images_are_reported_once_and_many_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.loader.RECENT_BYTES", 0)
    monkeypatch.setattr("data.loader.WINDOW", 0)  # nothing is kept in memory
    world = make_world(tmp_path / "disk")
    images = world / "images" / "train"
    train(config(world, tmp_path, **GIVEN), callbacks=[At(0, 1, lambda run: (images / "3.png").unlink())])
    said = capsys.readouterr().err
    assert said.count("image(s) replaced by grey") == 1
    assert said.count("3.png: cannot be read: No such file") == 1
    vanish = At(1, 1, lambda run: [(images / f"{i}.png").unlink() for i in range(4, 12)])
    failed(world, tmp_path / "many", r"of 11 images cannot be read any more \(at most 3 may\), first: .*\.png", vanish)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_worker_that_is_killed_ends_the_run_in_one_line(world, whole, tmp_path, capsys):
    def kill(run) -> None:
        """The signal of its end comes within the callback, whose errors are only warned of."""
        pid = multiprocessing.active_children()[0].pid
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    says = "a loader process was killed, most likely for lack of memory: give fewer --workers"
    last = failed(world, tmp_path, says, At(1, 0, kill), workers=2, save_steps=1)
    assert "left out" not in capsys.readouterr().err
    assert load_checkpoint(last).epoch >= 1
    assert equal(whole, weights_of(train(TrainConfig(resume=last)).save_dir))


def test_a_logger_that_raises_never_stops_a_run(world, whole, tmp_path, capsys):
    class Bad(Callback):
        calls = 0

        def on_batch(self, run, epoch, iteration, batch) -> None:
            Bad.calls += 1
            raise RuntimeError("the server\nis away")

    result = train(config(world, tmp_path, **GIVEN), callbacks=[Bad()])
    said = capsys.readouterr().err
    assert Bad.calls == 1
    assert said.count("warning: Bad failed (RuntimeError: the server is away) and is left out from now on") == 1
    assert equal(whole, weights_of(result.save_dir))


def poisoned(monkeypatch, steps: set[tuple[int, int]]) -> None:
    """Losses that are not finite at these (epoch, iteration)."""
    real = NonFiniteGuard.total_loss

    def total_loss(self, parts, *, epoch, iteration, paths):
        if (epoch, iteration) in steps:
            parts = {**parts, "box": parts["box"] * float("nan")}
        return real(self, parts, epoch=epoch, iteration=iteration, paths=paths)

    monkeypatch.setattr(NonFiniteGuard, "total_loss", total_loss)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "LION", "MuSGD"])
def test_step_with_non_finite_loss_is_skipped_and_counted(world, tmp_path, monkeypatch, capsys, optimizer):
    poisoned(monkeypatch, {(0, 0), (1, 2), (1, 3)})
    given = {**GIVEN, "optimizer": optimizer}
    result = train(config(world, tmp_path, skip_nan=True, **given))
    assert all(torch.isfinite(w).all() for w in weights_of(result.save_dir).values() if w.is_floating_point())
    said = capsys.readouterr().err
    assert "epoch 1: 1 step(s) were skipped, loss or gradient was not finite" in said
    assert "epoch 2: 2 step(s) were skipped" in said
    assert "epoch 3: " not in said
    lines = (result.save_dir / "nan_batches.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == [
        *("epoch 1, iteration 1", "epoch 2, iteration 3", "epoch 2, iteration 4")
    ]
    assert "box loss nan" in lines[0]
    assert lines[1].endswith(".png")
    assert len(lines) == 3 + 3 * 2  # two files each
    with open(result.save_dir / "results.csv") as file:
        assert "nan" not in file.read()


def test_persistent_non_finite_losses_end_the_run(world, tmp_path, monkeypatch):
    poisoned(monkeypatch, set(itertools.product(range(1, 3), range(6))))
    last = failed(world, tmp_path, r"epoch 2, iteration 3: the box loss became nan for 3 steps in a row; lower lr0", nan_patience=3)
    assert load_checkpoint(last).epoch == 1
    monkeypatch.undo()
    poisoned(monkeypatch, {(1, 4), (1, 5), (2, 0)})  # counted over the border of an epoch and over a resume
    last = failed(world, tmp_path / "b", r"epoch 3, iteration 1: the box loss became nan for 3 steps in a row", nan_patience=3)
    assert load_checkpoint(last).training["guard"]["in_row"] == 2
    with pytest.raises(UserError, match="epoch 3, iteration 1"):
        train(TrainConfig(resume=last))
    assert train(TrainConfig(resume=last, skip_nan=True)).epochs == 3


def test_clock_set_back_changes_nothing(world, whole, tmp_path, monkeypatch):
    backwards = itertools.count(2_000_000_000, -1000)
    for place in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(place, lambda: float(next(backwards)))
    for path in (world / "images" / "train").iterdir():
        os.utime(path, (2**31, 2**31))  # made in the future
    assert equal(whole, weights_of(train(config(world, tmp_path, **GIVEN)).save_dir))
