"""Checkpoints: round trip, damage, foreign files, and a full disk."""

from __future__ import annotations

import builtins
import errno
import pickle
import zipfile
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, load_model, previous_of, require_plugins, save_checkpoint
from models.spec.registry import load_plugin
from utils.errors import UserError


def example(**changes) -> Checkpoint:
    weights = {"model.0.conv.weight": torch.arange(20_000.0)}
    full = Checkpoint(cfg={"nc": 2}, cfg_name="a.yaml", names=("a", "b"), weights=weights, training={"rng": [1, [2, 3], None]})
    return replace(full, **changes)


def test_checkpoint_round_trips(tmp_path):
    save_checkpoint(tmp_path / "last.pt", example(epoch=3, plugins=({"name": "mine.py", "sha256": "0"},)))
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert (loaded.epoch, loaded.nc, loaded.names, loaded.training) == (3, 2, ("a", "b"), {"rng": [1, [2, 3], None]})
    assert torch.equal(loaded.weights["model.0.conv.weight"], torch.arange(20_000.0))
    assert loaded.plugins == ({"name": "mine.py", "sha256": "0"},)
    assert loaded.date
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


class FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()


@pytest.mark.parametrize("room", [0, 100, 50_000])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, room):
    path = tmp_path / "last.pt"
    save_checkpoint(path, example(epoch=1))
    real_open = builtins.open

    def open_full(file, mode="r", *args, **kwargs):
        opened = real_open(file, mode, *args, **kwargs)
        return FullDisk(opened, room) if mode == "wb" else opened

    monkeypatch.setattr(builtins, "open", open_full)
    with pytest.raises(UserError, match=r"last\.pt: cannot be saved \(No space left on device\); the previous one is intact"):
        save_checkpoint(path, example(epoch=2))
    monkeypatch.undo()
    assert load_checkpoint(path).epoch == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_failed_rename_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, example(epoch=1))

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match="Input/output error"):
        save_checkpoint(path, example(epoch=2))
    assert load_checkpoint(path).epoch == 1


def archive(path, names):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in names.items():
            z.writestr(name, content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04 nothing more", "damaged checkpoint"),
        (b"some text", "not a checkpoint"),
        (b"\x10\0\0\0\0\0\0\0{}", "safetensors"),
        (pickle.dumps({"a": 1}), "not one that torch.save wrote"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused_by_kind(tmp_path, content, says):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"x/data.pkl": b"cmodels.yolo\nDetectionModel\n."}, "not a network"),
        ({"x/data.pkl": b"cultralytics.nn.tasks\nDetectionModel\n"}, "damaged"),
        ({"x/readme.txt": b"nothing"}, "a zip file, not a checkpoint"),
        ({"x/data.pkl": b"", "x/constants.pkl": b""}, "TorchScript"),
    ],
)
def test_archives_without_a_network_are_refused(tmp_path, names, says):
    archive(tmp_path / "x.pt", names)
    with pytest.raises(UserError, match=says):
        load_checkpoint(tmp_path / "x.pt")


class Marker:
    ran = False

    def __setstate__(self, state):
        Marker.ran = True


def test_unpickling_builds_no_objects(tmp_path):
    torch.save({"format": "x", "model": Marker()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: asks for .*Marker, which no weights need; refused, nothing of it was run"):
        load_checkpoint(tmp_path / "x.pt")
    assert not Marker.ran


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: whole[:-5000] + bytes(5000),
        lambda whole: whole[: len(whole) // 2] + bytes(100) + whole[len(whole) // 2 + 100 :],  # only the checksum shows it
    ],
    ids=["half", "one byte", "end", "middle"],
)
def test_truncated_file_is_reported_as_damaged(tmp_path, damage):
    save_checkpoint(tmp_path / "last.pt", example())
    (tmp_path / "torn.pt").write_bytes(damage((tmp_path / "last.pt").read_bytes()))
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path / "torn.pt")


def test_previous_save_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    for epoch in range(3):
        save_checkpoint(path, example(epoch=epoch), keep_previous=True)
        assert load_checkpoint(path).epoch == epoch
    assert load_checkpoint(previous_of(path)).epoch == 1

    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr("os.link", refuse)
    save_checkpoint(path, example(epoch=3), keep_previous=True)
    assert [load_checkpoint(p).epoch for p in (path, previous_of(path))] == [3, 2]


def test_bare_weights_newer_formats_and_missing_files_are_reported(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "bare.pt")
    bare = load_checkpoint(tmp_path / "bare.pt")
    assert not bare.cfg
    assert set(bare.weights) == {"weight", "bias"}
    with pytest.raises(UserError, match=r"bare weights of a network that is not recognised; train\.py takes them with --cfg"):
        load_model(tmp_path / "bare.pt")
    torch.save({"format": "yolo-attention checkpoint", "format_version": 99}, tmp_path / "new.pt")
    with pytest.raises(UserError, match="format version 99 is newer"):
        load_checkpoint(tmp_path / "new.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match="a folder"):
        load_checkpoint(tmp_path)


def test_plugin_with_another_hash_is_refused(tmp_path, capsys):
    """Only a file that is given for this checkpoint may stand for one that it needs, and only for one."""
    paths = [tmp_path / folder / "ours.py" for folder in "abc"]
    for i, path in enumerate(paths):
        path.parent.mkdir()
        path.write_text(
            "from models.spec import channel_rules as rules\nfrom models.spec.registry import register\nfrom torch import nn\n"
            f"register('Numbered_{i}', channels=rules.same_width)(type('Numbered_{i}', (nn.Identity,), {{}}))\n"
        )
    first, second, _ = (asdict(load_plugin(path)) for path in paths)
    require_plugins(example(plugins=(first, second)), ())  # the very files are loaded
    unknown = {"name": "ours.py", "sha256": "1" * 64}
    with pytest.raises(UserError, match=r"needs ours\.py again"):
        require_plugins(example(plugins=(unknown,)), ())
    with pytest.raises(UserError, match=r"needs another ours\.py, too \(its sha256 begins with 11111111\): add its path to --plugins"):
        require_plugins(example(plugins=(first, unknown)), [paths[0]])
    assert capsys.readouterr().out == ""
    require_plugins(example(plugins=(unknown, first)), [paths[0], paths[2]])
    assert "another version of ours.py" in capsys.readouterr().out


def test_missing_plugin_is_named():
    with pytest.raises(UserError, match=r"needs mine\.py again: add --plugins mine\.py"):
        require_plugins(example(plugins=({"name": "mine.py", "sha256": "0" * 64},)), ())
