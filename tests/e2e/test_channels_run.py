"""Training, validation, detection and export on images that are not 8-bit RGB."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

import detect
import val
from data.dataset_spec import load_dataset_spec
from engine.channels import spec_for, with_channels
from export import ExportConfig, export
from models import build_model, load_model
from models.analysis.profiling import main as profiling
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.export.model import load_exported
from tests.bands import square_image, write_image, write_squares
from tests.golden import fill_
from train import main, train
from utils.config import Hyperparameters, TrainConfig

TINY = """
nc: 80
depth_multiple: 1.0
width_multiple: 1.0
anchors: 3
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [[2, 3], 1, DDetect, [nc]]
"""
HYP = Hyperparameters(warmup_epochs=1, warmup_min_iters=0, nbs=4, lr0=0.01, mosaic=0.0, degrees=5.0)
KINDS = {
    "grey, 8 bits": (1, np.uint8, ".png"),
    "infrared, 16 bits": (1, np.uint16, ".png"),
    "RGBN, 8 bits": (4, np.uint8, ".png"),
    "five bands, 16 bits": (5, np.uint16, ".tif"),
}


def settings(root: Path, data: Path, **changes) -> TrainConfig:
    (root / "tiny-v9.yaml").write_text(TINY)
    given = {
        "cfg": root / "tiny-v9.yaml", "data": data, "hyp": HYP, "imgsz": 64, "epochs": 12, "batch_size": 4, "workers": 0, "seed": 3,
        "optimizer": "AdamW", "device": "cpu", "project": root / "runs", "noplots": True, "nosave": True,
    }  # fmt: skip
    return TrainConfig(**{**given, **changes})


def checkpoint_of(path: Path, channels: int) -> Path:
    model = build_model(yaml.safe_load(TINY), ch=channels, names=("dark", "bright"))
    fill_(model, 1.35)
    save_checkpoint(path, Checkpoint(model.spec.to_dict(), "tiny-v9.yaml", model.names, model.state_dict()))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_multichannel_network_trains_validates_detects_and_exports(tmp_path, capsys, monkeypatch, kind):
    channels, dtype, suffix = KINDS[kind]
    data = write_squares(tmp_path, channels=channels, dtype=dtype, suffix=suffix)
    inputs = kind == "five bands, 16 bits"
    if not inputs:
        monkeypatch.setattr("tasks.detect.DetectTask.plot", lambda *_: None)  # curves know nothing of channels, and take the longest
    result = train(settings(tmp_path, data, noplots=not inputs, cache="disk" if inputs else "ram"))
    assert f"images of {channels} channel" in capsys.readouterr().out
    with open(result.save_dir / "results.csv", newline="") as file:
        losses = [sum(float(v) for k, v in row.items() if k.strip().startswith("train/")) for row in csv.DictReader(file)]
    assert losses[-1] < 0.7 * losses[0]
    if inputs:
        assert cv2.imread(str(result.save_dir / "train_batch0.jpg")).std() > 20
    checkpoint = load_checkpoint(result.best_weights)
    assert (checkpoint.ch, checkpoint.cfg["ch"]) == (channels, channels)

    arguments = ["--weights", str(result.best_weights), "--device", "cpu", "--project", str(tmp_path / "out"), "--imgsz", "64"]
    assert val.main([*arguments, "--data", str(data), "--workers", "0"]) == 0
    assert (tmp_path / "out" / "exp" / "val_batch0_labels.jpg").stat().st_size > 1000

    (onnx,) = export(ExportConfig(weights=str(result.best_weights), include=("onnx",), imgsz=(64, 64)))
    assert onnx.difference_score < 1e-4
    exported, images = load_exported(onnx.path), torch.rand(1, channels, 64, 64)
    assert exported.ch == channels
    expected = load_model(result.best_weights).deploy().predict(images)
    torch.testing.assert_close(exported.predict(images).scores, expected.scores, atol=1e-4, rtol=0)

    source = ["--source", str(tmp_path / "images" / "val"), "--conf-thres", "0.01", "--save-crop"]
    for weights in (result.best_weights, onnx.path):
        assert detect.main(["--weights", str(weights), *arguments[2:], *source, "--name", f"found{weights.suffix}"]) == 0
        drawn = cv2.imread(str(tmp_path / "out" / f"found{weights.suffix}" / f"0{suffix}"), cv2.IMREAD_UNCHANGED)
        assert (drawn.shape, drawn.dtype) == ((64, 64, 3), np.uint8)
        assert drawn.std() > 20  # seen, not black


class TestTransfer:
    @pytest.mark.parametrize(("channels", "suffix"), [(1, ".png"), (4, ".png")])
    def test_rgb_checkpoint_is_adapted_and_reported(self, tmp_path, capsys, channels, suffix):
        weights = checkpoint_of(tmp_path / "rgb.pt", 3)
        data = write_squares(tmp_path, channels=channels, dtype=np.uint8, suffix=suffix, train=4, val=2)
        result = train(settings(tmp_path, data, cfg="", weights=weights, epochs=1))
        said = capsys.readouterr().out
        assert f"row 0 Conv (first convolution adapted from 3 to {channels} input channels" in said
        assert "100 % of the network's are filled" in said
        assert f"channels  {channels}, as {data} says (ch), which decides; {weights} says 3" in said
        assert load_checkpoint(result.best_weights).ch == channels

    def test_model_channels_are_used_if_the_data_set_names_none(self, tmp_path, capsys):
        """A model YAML with ch: 1 reads colour photographs as grey."""
        data = write_squares(tmp_path, channels=3, dtype=np.uint8, suffix=".png", train=4, val=2, ch=False)
        cfg = tmp_path / "grey-v9.yaml"
        cfg.write_text(TINY + "ch: 1\n")
        result = train(settings(tmp_path, data, cfg=cfg, epochs=1))
        assert load_checkpoint(result.best_weights).ch == 1
        assert "which decides" not in capsys.readouterr().out
        assert val.main(["--weights", str(result.best_weights), "--imgsz", "64", "--project", str(tmp_path), "--device", "cpu"]) == 0
        resumed = result.save_dir / "weights" / "last.pt"
        data.write_text(data.read_text() + "ch: 3\n")
        assert val.main(["--weights", str(resumed), "--imgsz", "64", "--project", str(tmp_path), "--device", "cpu"]) == 1
        assert f"{data}: ch: 3, but {resumed} takes 1 channels; give the data set of its own" in capsys.readouterr().err

    def test_data_set_channels_override_the_model_yaml(self, tmp_path, capsys):
        data = write_squares(tmp_path, channels=4, dtype=np.uint8, suffix=".png", train=1, val=1)
        config, spec = settings(tmp_path, data), load_dataset_spec(data)
        assert with_channels(spec, config, None) is spec
        assert capsys.readouterr().out == ""
        (tmp_path / "tiny-v9.yaml").write_text(TINY + "ch: 1\n")
        assert with_channels(spec, config, None).ch == 4
        assert capsys.readouterr().out == f"channels  4, as {data} says (ch), which decides; {config.cfg} says 1\n"

    def test_a_resumed_run_keeps_its_channels(self, tmp_path, capsys):
        data = write_squares(tmp_path, channels=4, dtype=np.uint8, suffix=".png", train=4, val=2)
        config = settings(tmp_path, data, epochs=1)
        assert train(config).epochs == 1
        checkpoint = load_checkpoint(tmp_path / "runs" / "exp" / "weights" / "last.pt")
        assert spec_for(load_dataset_spec(data), checkpoint, weights="last.pt").ch == 4
        data.write_text(data.read_text().replace("ch: 4", ""))
        assert spec_for(load_dataset_spec(data), checkpoint, weights="last.pt").ch == 4


class TestDetect:
    def run(self, tmp_path, channels, *arguments):
        weights = checkpoint_of(tmp_path / f"{channels}.pt", channels)
        given = ["--weights", weights, "--imgsz", "64", "--device", "cpu", "--project", tmp_path / "out", *arguments]
        return detect.main([*map(str, given)])

    def mixed(self, tmp_path) -> Path:
        folder = tmp_path / "mixed"
        folder.mkdir()
        for channels, dtype in ((1, np.uint8), (1, np.uint16), (3, np.uint8), (3, np.uint16), (4, np.uint8)):
            image, _ = square_image(np.random.default_rng(0), channels, dtype, 1)
            write_image(folder / f"{channels}x{8 * np.dtype(dtype).itemsize}.png", image)
        return folder

    @pytest.mark.parametrize("channels", [1, 3])
    def test_grey_and_rgb_networks_accept_any_image(self, tmp_path, capsys, channels):
        assert self.run(tmp_path, channels, "--source", self.mixed(tmp_path)) == 0
        assert "objects in 5 images\n" in capsys.readouterr().out

    def test_other_networks_refuse_other_channel_counts(self, tmp_path, capsys):
        folder = self.mixed(tmp_path)
        assert self.run(tmp_path, 4, "--source", folder) == 0
        said = capsys.readouterr().out
        assert [line for line in said.splitlines() if line.startswith("skipped")] == [
            f"skipped: {folder / f'{channels}x{bits}.png'}: {channels} channels, 4 are expected" for channels in (1, 3) for bits in (16, 8)
        ]
        assert self.run(tmp_path, 5, "--source", folder / "3x8.png") == 1
        ended = capsys.readouterr()
        assert "3x8.png: 3 channels, 5 are expected" in ended.out
        assert "nothing readable" in ended.err

    def test_videos_are_read_as_grey_or_rgb_only(self, tmp_path, capsys):
        path = tmp_path / "clip.avi"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 64))
        for _ in range(2):
            writer.write(np.full((64, 64, 3), 90, np.uint8))
        writer.release()
        assert self.run(tmp_path, 1, "--source", path) == 0
        assert "objects in 2 images" in capsys.readouterr().out
        assert self.run(tmp_path, 4, "--source", path) == 1
        assert "clip.avi: a video has 3 channels, 4 are expected; give images" in capsys.readouterr().out
        assert self.run(tmp_path, 4, "--source", "0") == 1
        assert "webcam0: a video has 3 channels, 4 are expected" in capsys.readouterr().err


def test_profiling_accepts_other_channels(tmp_path, capsys):
    (tmp_path / "tiny-v9.yaml").write_text(TINY)
    multiply_adds = {}
    for channels in (1, 4):
        profiling([str(tmp_path / "tiny-v9.yaml"), "--ch", str(channels), "--imgsz", "64", "--csv", str(tmp_path / "costs.csv")])
        with open(tmp_path / "costs.csv", newline="") as file:
            multiply_adds[channels] = int(next(csv.DictReader(file))["multiply_adds"])
    assert multiply_adds[4] == 4 * multiply_adds[1] == 4 * 9 * 8 * 32 * 32


def test_a_wrong_count_everywhere_stops_training_in_one_line(tmp_path, capsys):
    data = write_squares(tmp_path, channels=3, dtype=np.uint8, suffix=".png", train=2, val=1)
    data.write_text(data.read_text().replace("ch: 3", "ch: 6"))
    (tmp_path / "tiny-v9.yaml").write_text(TINY)
    assert main(["--cfg", str(tmp_path / "tiny-v9.yaml"), "--data", str(data), "--imgsz", "64", "--epochs", "1", "--device", "cpu"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"none of the 2 images of 'train' can be used, first: .*3 channels, 6 are expected", error)
