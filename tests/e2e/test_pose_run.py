"""Pose estimation through every script at a tiny size: train, resume, validate, detect, in slices too, export and the exported file."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import detect
import export
import val
from models.checkpoints.checkpoint import load_checkpoint, load_model
from tests.e2e.test_fake_cuda_run import gpu, waits_in_training
from tests.tiny_training import HYP
from train import train
from utils.config import TrainConfig

TINY = """
nc: 80
kpt_shape: [17, 3]
end2end: True
reg_max: 1
scales: {{n: [1.0, 1.0, 1024]}}
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [[2, 3], 1, {head}, [nc, kpt_shape]]
"""
SIDE = 24


def make_images(root: Path, *, train: int = 8, val: int = 4) -> Path:
    """Images of one square, whose left and right upper corners are its keypoints; models and a data file."""
    rng = np.random.default_rng(0)
    truth: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 0, "name": "square"}]}
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(60, 120, (64, 64, 3)).astype(np.uint8)
            x, y = rng.integers(4, 36, 2).tolist()
            image[y : y + SIDE, x : x + SIDE] = 250
            (root / f"images/{split}/{i}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
            values = [(x + SIDE / 2) / 64, (y + SIDE / 2) / 64, SIDE / 64, SIDE / 64, x / 64, y / 64, 2, (x + SIDE) / 64, y / 64, 2]
            (root / f"labels/{split}/{i}.txt").write_text(" ".join(map(str, (0, *values))) + "\n")
            if split == "val":
                truth["images"].append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
                points = [x, y, 2, x + SIDE, y, 2]
                truth["annotations"].append({"id": i + 1, "image_id": i, "category_id": 0, "bbox": [x, y, SIDE, SIDE], "keypoints": points})
    (root / "annotations").mkdir()
    (root / "annotations/person_keypoints_val.json").write_text(json.dumps(truth))
    (root / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\nnames: [square]\nkpt_shape: [2, 3]\nflip_idx: [1, 0]\nskeleton: [[0, 1]]\n"
    )
    for head in ("Pose", "Pose26"):
        text = TINY.format(head=head) if head == "Pose26" else TINY.format(head=head).replace("end2end: True\nreg_max: 1\n", "")
        (root / f"tiny-{head}.yaml").write_text(text)
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("pose"))


def config(world: Path, name: str, **changes) -> TrainConfig:
    given = {
        "cfg": world / "tiny-Pose26.yaml", "data": world / "data.yaml", "hyp": HYP.replace(mosaic=0.5, nbs=4), "imgsz": 64, "epochs": 2,
        "batch_size": 4, "workers": 0, "device": "cpu", "project": world / "runs", "name": name, "seed": 3, "optimizer": "AdamW",
    }  # fmt: skip
    return TrainConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    return train(config(world, "exp")).save_dir


def run(root: Path, script, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return script.main([*arguments, "--device", "cpu", "--project", "runs"])


def test_training_writes_columns_and_figures_of_both_measures(trained):
    rows = list(csv.DictReader((trained / "results.csv").read_text(encoding="utf-8").splitlines()))
    columns = {name.strip() for name in rows[0]}
    assert {"train/pose_loss", "train/kobj_loss", "train/rle_loss", "metrics/mAP_0.5(B)", "metrics/mAP_0.5:0.95(P)"} <= columns
    written = {p.name for p in trained.iterdir()}
    assert {"train_batch0.jpg", "val_batch0_labels.jpg", "val_batch0_pred.jpg", "results.png", "keypoints"} <= written
    model = load_model(trained / "weights/best.pt")
    assert model.task.keypoints.shape == (2, 3)
    assert model.task.keypoints.skeleton == ((0, 1),)
    assert not any("flow_model" in name for name in load_checkpoint(trained / "weights/best-deploy.pt").weights)


@pytest.mark.parametrize("head", ["Pose", "Pose26"])
@pytest.mark.usefixtures("same_kernels")
def test_a_step_on_the_fake_device_waits_for_nothing(world, head):
    given = {"cfg": world / f"tiny-{head}.yaml", "epochs": 1, "batch_size": 8, "amp": "off", "noplots": True, "noval": True}
    with gpu() as seen:
        train(config(world, f"waits-{head}", **given))
    assert not waits_in_training(seen)


def test_a_resumed_run_ends_with_the_same_weights(world, trained):
    from tests.e2e.test_resume import Signal

    with pytest.raises(KeyboardInterrupt):
        train(config(world, "stopped"), callbacks=[Signal(0, 0, signal.SIGINT)])
    again = train(TrainConfig(resume=str(world / "runs/stopped/weights/last.pt"))).save_dir
    first, second = (load_checkpoint(folder / "weights/last.pt").weights for folder in (trained, again))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_validation_writes_keypoints_and_pycocotools_agrees(world, trained, capsys):
    flags = ["--weights", str(trained / "weights/best.pt"), "--data", str(world / "data.yaml"), "--imgsz", "64", "--workers", "0"]
    assert run(world, val, *flags, "--save-json", "--save-txt", "--name", "val") == 0
    printed = capsys.readouterr().out
    assert "pycocotools (keypoints): AP " in printed
    folder = next((world / "runs").glob("val*"))
    assert all(len(entry["keypoints"]) == 6 for entry in json.loads((folder / "best_predictions.json").read_text()))
    numbers = json.loads((folder / "metrics.json").read_text())
    listed = printed.split("pycocotools (keypoints): AP ")[1].split(",")[0]
    assert float(listed) == pytest.approx(numbers["metrics"]["metrics/mAP_0.5:0.95(P)"], abs=2e-3)
    assert all(len(line.split()) == 11 for path in folder.rglob("labels/*.txt") for line in path.read_text().splitlines())


@pytest.mark.parametrize("head", ["Pose", "Pose26"])
def test_an_exported_file_detects_as_the_weights_do(world, trained, head):
    if head == "Pose26":
        folder = trained
    else:
        folder = train(config(world, "plain", cfg=world / "tiny-Pose.yaml", epochs=1, noplots=True)).save_dir
    weights = folder / "weights/best.pt"
    assert export.main(["--weights", str(weights), "--include", "onnx", "--imgsz", "64"]) == 0
    rows = []
    for file in (weights, weights.with_suffix(".onnx")):
        flags = ["--weights", str(file), "--source", str(world / "images/val"), "--imgsz", "64", "--conf-thres", "0.001", "--max-det", "5"]
        assert run(world, detect, *flags, "--save-txt", "--name", f"{head}{file.suffix}") == 0
        found = sorted((world / f"runs/{head}{file.suffix}").rglob("labels/*.txt"))
        rows.append([[float(v) for v in line.split()] for path in found for line in path.read_text().splitlines()])
    assert len(rows[0]) > 0
    np.testing.assert_allclose(np.array(rows[0]), np.array(rows[1]), atol=2e-3)


def test_slices_give_keypoints_too(world, trained):
    flags = ["--weights", str(trained / "weights/best.pt"), "--source", str(world / "images/val"), "--imgsz", "64", "--conf-thres", "0.001"]
    assert run(world, detect, *flags, "--slice", "40", "--save-txt", "--max-det", "5", "--name", "sliced") == 0
    lines = [line for path in (world / "runs/sliced").rglob("labels/*.txt") for line in path.read_text().splitlines()]
    assert lines
    assert all(len(line.split()) == 11 for line in lines)


def test_other_keypoints_than_the_networks_are_one_line(world, trained, capsys):
    (world / "other.yaml").write_text((world / "data.yaml").read_text().replace("[2, 3]", "[3, 2]").replace("[1, 0]", "[1, 0, 2]"))
    flags = ["--weights", str(trained / "weights/best.pt"), "--data", str(world / "other.yaml"), "--imgsz", "64", "--workers", "0"]
    assert run(world, val, *flags) != 0
    assert "kpt_shape: [3, 2], but the network predicts keypoints of [2, 3]" in capsys.readouterr().err
