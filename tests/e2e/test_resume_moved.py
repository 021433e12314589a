"""What a resume finds changed: the data set lies elsewhere, the run folder belongs to another process or is damaged."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from engine.logging.callbacks import Callback
from engine.training.resume import load_resumed_run
from models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tests.tiny_training import config, make_world
from train import train
from utils.config import TrainConfig
from utils.errors import UserError


class StopAt(Callback):
    """Ends the run at a batch of the second epoch."""

    def on_batch(self, run, epoch, iteration, batch) -> None:
        if (epoch, iteration) == (1, 1):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a data set in ``here``, a run ``stopped/exp`` that names it relative to the folder, and the same run ``whole/exp``."""
    root = tmp_path_factory.mktemp("place")
    make_world(root / "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train(config(Path("here"), Path("whole"), epochs=2))
        with pytest.raises(KeyboardInterrupt):
            train(config(Path("here"), Path("stopped"), epochs=2), callbacks=[StopAt()])
    return root


@pytest.fixture
def copy(place, tmp_path, monkeypatch) -> Path:
    """A copy of it, whose working directory is another one; the original data set stays where it was."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place, tmp_path / "place")
    return tmp_path / "place"


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "weights" / "last.pt").weights


def assert_same_weights(place: Path, run: Path) -> None:
    whole, resumed = weights_of(place / "whole" / "exp"), weights_of(run)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def refused(run: Path, **given) -> str:
    """The line of a resume that is refused."""
    with pytest.raises(UserError) as caught:
        train(TrainConfig(resume=run, **given))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_relative_path_is_kept_absolute_for_another_working_directory(place, copy):
    run = copy / "stopped" / "exp"
    flags = yaml.safe_load((run / "opt.yaml").read_text())
    assert flags["data"] == "here/data.yaml"
    paths = {"cfg": "here/tiny-v9.yaml", "data": "here/data.yaml", "project": "stopped"}
    assert flags["absolute"] == {name: str(place / path) for name, path in paths.items()}
    assert TrainConfig.from_dict(flags).data == "here/data.yaml"
    train(TrainConfig(resume=run))
    assert_same_weights(place, run)


def test_moved_data_are_named_anew_and_give_the_same_weights(place, copy):
    run, last = copy / "stopped" / "exp", copy / "stopped" / "exp" / "weights" / "last.pt"
    checkpoint = load_checkpoint(last)
    gone = {**checkpoint.training["data"], "file": "/gone/here/data.yaml"}
    save_checkpoint(last, replace(checkpoint, training={**checkpoint.training, "data": gone}))
    said = refused(run)
    assert said.startswith("dataset file here/data.yaml not found")
    assert said.endswith(f"if the data set was moved, add --data FILE to --resume {last}")
    (copy / "here").rename(copy / "there")
    train(TrainConfig(resume=run, data=copy / "there" / "data.yaml"))
    assert_same_weights(place, run)


@pytest.mark.parametrize(("split", "changed"), [("train", "label"), ("val", "label"), ("train", "image")])
def test_other_labels_at_another_place_are_refused(copy, split, changed):
    run, there = copy / "stopped" / "exp", copy / "here"
    before = weights_of(run)
    if changed == "label":
        (there / "labels" / split / "1.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    else:
        (there / "images" / split / "1.png").rename(there / "images" / split / "one.png")
        (there / "labels" / split / "1.txt").rename(there / "labels" / split / "one.txt")
    said = refused(run, data=there / "data.yaml")
    assert said.startswith(f"{there / 'data.yaml'}: the labels of {split} are not those that the run was trained with in /")
    assert all(torch.equal(before[key], value) for key, value in weights_of(run).items())


def test_changed_labels_at_the_same_place_are_a_warning(copy, monkeypatch, capsys):
    monkeypatch.chdir(copy)
    there = {**load_checkpoint("stopped/exp/weights/last.pt").training["data"], "file": str(copy / "here" / "data.yaml")}
    checkpoint = load_checkpoint("stopped/exp/weights/last.pt")
    save_checkpoint("stopped/exp/weights/last.pt", replace(checkpoint, training={**checkpoint.training, "data": there}))
    (copy / "here" / "labels" / "train" / "1.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    train(TrainConfig(resume="stopped/exp"))
    assert "here/data.yaml: the labels of train have changed since the run was saved" in capsys.readouterr().err


def test_other_classes_are_refused(copy):
    data = copy / "here" / "data.yaml"
    for names, said in (("[bright, dark]", "class 0 is 'bright', in the run to resume it is 'dark'"), ("[dark]", "class 1 is absent, ")):
        data.write_text(data.read_text().split("names")[0] + f"names: {names}\n")
        assert f"{data}: {said}" in refused(copy / "stopped" / "exp", data=data)


def test_checkpoint_without_the_hash_says_so(copy, capsys):
    last = copy / "stopped" / "exp" / "weights" / "last.pt"
    checkpoint = load_checkpoint(last)
    save_checkpoint(last, replace(checkpoint, training={k: v for k, v in checkpoint.training.items() if k != "data"}))
    train(TrainConfig(resume=last, data=copy / "here" / "data.yaml"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "hash" in line]
    assert line.startswith("warning: --data ")
    assert "was saved by an older version, without a hash of its labels; whether they are the same is not checked" in line


def test_second_process_is_refused_while_a_run_trains_or_finishes(place, tmp_path):
    said = []

    class Intruder(Callback):
        def on_batch(self, run, epoch, iteration, batch) -> None:
            if iteration == 0:
                said.append(refused(run.save_dir))
                with pytest.raises(UserError, match="trains in it") as caught:
                    train(config(place / "here", tmp_path, exist_ok=True))
                said.append(str(caught.value))

        def on_train_end(self, run) -> None:
            said.append(refused(run.save_dir))

    done = train(config(place / "here", tmp_path, epochs=1), callbacks=[Intruder()])
    assert len(said) == 3
    assert all(line.startswith(f"{done.save_dir}: process ") and "trains in it, or is finishing; wait" in line for line in said)
    assert not (done.save_dir / ".lock").exists()
    assert "the run was finished" in refused(done.save_dir)


@pytest.mark.parametrize("damage", [None, b"", b"\xff\xfe{", b"- a\n- b\n", b"a: [\n"], ids=["missing", "empty", "bytes", "list", "broken"])
def test_damaged_opt_yaml_is_written_again(copy, capsys, damage):
    run = copy / "stopped" / "exp"
    (run / "opt.yaml").unlink()
    if damage is not None:
        (run / "opt.yaml").write_bytes(damage)
    load_resumed_run(TrainConfig(resume=run))
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"warning: {run / 'opt.yaml'}: ") and line.endswith("written again from last.pt") for line in said] == [True]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (None, "missing"),
        (b"\xff\xfe\x00", "damaged"),
        (b"epoch,a\n7,1\n", "do not count"),
        (b"epoch\nx\n", "damaged"),
        (b"epoch\n0\n1\n2\n3\n", "4 rows, 1"),
    ],
)
def test_damaged_results_are_written_again(copy, capsys, damage, reason):
    run = copy / "stopped" / "exp"
    (run / "results.csv").unlink()
    if damage is not None:
        (run / "results.csv").write_bytes(damage)
    load_resumed_run(TrainConfig(resume=run))
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {run / 'results.csv'}: ")
    assert reason in said
    assert said.endswith("written again from last.pt")


def test_undamaged_folder_is_silent(copy, capsys):
    load_resumed_run(TrainConfig(resume=copy / "stopped" / "exp"))
    assert capsys.readouterr().err == ""


def test_checkpoint_of_another_run_is_refused(copy):
    run = copy / "stopped" / "exp"
    flags = yaml.safe_load((run / "opt.yaml").read_text())
    (run / "opt.yaml").write_text(yaml.safe_dump({**flags, "epochs": 9}))
    assert refused(run).startswith(f"{run / 'opt.yaml'}: has epochs: 9, the checkpoint 2 (")
