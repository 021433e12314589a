"""Classification through every script at a tiny size: train, resume, validate, detect, export, hub, and a detector on its backbone."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import detect
import export
import train
import val
from engine.inference.image_model import ImageModel
from models.checkpoints.checkpoint import load_checkpoint, load_model
from utils.config import Hyperparameters

NAMES = ("green", "red")
TINY = """
nc: 80
scales: {n: [1.0, 1.0, 1024]}
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [-1, 1, Classify, [nc]]
"""
HYP = {
    "warmup_epochs": 0, "warmup_min_iters": 0, "nbs": 8, "auto_augment": "randaugment", "erasing": 0.4, "scale": 0.5, "mosaic": 0,
    "mixup": 0, "copy_paste": 0, "translate": 0,
}  # fmt: skip


def make_images(root: Path, *, count: int = 12) -> Path:
    """Fills ``root/colours`` with images of two classes, a folder each, and writes a tiny model and a recipe."""
    rng = np.random.default_rng(0)
    for split, most in (("train", count), ("val", 4)):
        for label, name in enumerate(NAMES):
            (root / "colours" / split / name).mkdir(parents=True)
            for i in range(most // 2):
                image = rng.integers(60, 120, (48 + 4 * i, 64, 3)).astype(np.uint8)
                image[..., 1 + label] += 80  # of OpenCV's BGR
                (root / "colours" / split / name / f"{i}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    (root / "tiny-cls.yaml").write_text(TINY)
    Hyperparameters(**HYP).to_yaml(root / "hyp.yaml")
    return root


def run(root: Path, script, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return script.main([*arguments, "--device", "cpu", "--project", "runs"])


def trained(root: Path, name: str, *arguments: str) -> int:
    flags = ["--cfg", "tiny-cls.yaml", "--data", "colours", "--hyp", "hyp.yaml", "--imgsz", "32", "--batch-size", "4", "--workers", "0"]
    return run(root, train, *flags, "--name", name, *arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_images(tmp_path_factory.mktemp("classify"))
    assert trained(root, "exp", "--epochs", "3", "--image-weights", "--optimizer", "AdamW") == 0
    return root


def test_training_writes_the_columns_and_figures_of_classification(world):
    folder = world / "runs/exp"
    rows = list(csv.DictReader((folder / "results.csv").read_text(encoding="utf-8").splitlines()))
    metrics = [name for name in rows[0] if name.startswith(("metrics/", "train/", "val/"))]
    assert metrics == ["train/cls_loss", "metrics/accuracy_top1", "metrics/accuracy_top5", "val/cls_loss"]
    assert len(rows) == 3
    assert all(0 <= float(row["metrics/accuracy_top1"]) <= 1 for row in rows)
    written = {p.name for p in folder.iterdir()}
    assert {"labels.jpg", "train_batch0.jpg", "val_batch0_pred.jpg", "results.png", "confusion_matrix.png", "class_accuracy.png"} <= written
    assert (folder / "weights/best-deploy.pt").exists()


def test_a_resumed_training_ends_with_the_same_weights_bit_for_bit(world):
    assert trained(world, "whole", "--epochs", "2", "--save-steps", "1") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.training.saving._is_stop_due", lambda run, steps: steps == 4)
        assert trained(world, "cut", "--epochs", "2", "--save-steps", "1") != 0
    assert run(world, train, "--resume", "runs/cut/weights/last.pt") == 0
    one, other = (load_checkpoint(world / f"runs/{name}/weights/last.pt").weights for name in ("whole", "cut"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_validation_agrees_with_the_exported_file(world, capsys):
    best = world / "runs/exp/weights/best.pt"
    assert export.main(["--weights", str(best), "--include", "onnx", "--imgsz", "32", "--dynamic"]) == 0
    capsys.readouterr()
    lines = []
    for suffix in ("pt", "onnx"):
        pytest.importorskip("onnxruntime")
        weights = ["--weights", str(best.with_suffix(f".{suffix}")), "--data", "colours", "--imgsz", "32", "--name", suffix]
        assert run(world, val, *weights, "--save-txt", "--workers", "0") == 0
        lines.append(next(line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["all"]))
    assert lines[0] == lines[1]
    texts = [sorted(p.read_text() for p in (world / f"runs/{suffix}/labels").rglob("*.txt")) for suffix in ("pt", "onnx")]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 4


def test_detection_writes_scores_and_names_and_draws_the_strip(world, capsys):
    source = ["--weights", "runs/exp/weights/best.pt", "--source", "colours/val/green", "--imgsz", "32"]
    assert run(world, detect, *source, "--save-txt", "--save-csv", "--name", "found") == 0
    out = capsys.readouterr().out
    assert "32x32 " in out
    assert "objects" not in out
    rows = (world / "runs/found/labels/0.txt").read_text().splitlines()
    assert sorted(row.split()[1] for row in rows) == sorted(NAMES)
    assert sum(float(row.split()[0]) for row in rows) == pytest.approx(1, abs=0.011)
    drawn, before = (cv2.imread(str(p)) for p in (world / "runs/found/0.png", world / "colours/val/green/0.png"))
    assert drawn.shape == before.shape
    assert (drawn != before).any()


@pytest.mark.parametrize(("script", "flags"), [(detect, ["--source", "colours/val/green"]), (val, ["--data", "colours"])])
def test_windows_are_refused_in_a_line(world, capsys, script, flags):
    assert run(world, script, "--weights", "runs/exp/weights/best.pt", *flags, "--slice", "32") == 1
    assert "--slice: windows are for objects in places" in capsys.readouterr().err


def test_the_hub_model_gives_probabilities(world):
    model = ImageModel(load_model(world / "runs/exp/weights/best.pt").deploy())
    results = model(str(world / "colours/val/red/0.png"), size=32)
    probs = results.probs
    assert probs.top1 == probs.top5[0]
    assert set(probs.top5) == {0, 1}
    assert float(probs.top5conf.sum()) == pytest.approx(1, abs=1e-5)
    assert results[0].probs.top1 == probs.top1
    assert NAMES[probs.top1] in str(results)
    assert float(probs.top1conf) == pytest.approx(float(model(str(world / "colours/val/red/0.png"), size=32, augment=False).probs.top1conf))


def test_its_rows_become_the_backbone_of_another_network(world, capsys):
    (world / "wider-cls.yaml").write_text(TINY.replace("[-1, 1, Conv, [32, 3, 2]]", "[-1, 1, Conv, [32, 3, 2]]\n  - [-1, 1, SE, []]"))
    flags = ["--cfg", "wider-cls.yaml", "--backbone-weights", "runs/exp/weights/best.pt", "--data", "colours", "--hyp", "hyp.yaml"]
    assert run(world, train, *flags, "--imgsz", "32", "--epochs", "1", "--workers", "0", "--noplots", "--name", "on") == 0
    assert "nothing of" not in capsys.readouterr().err


def test_a_detection_set_and_a_class_folder_are_not_confused(world, capsys):
    (world / "plain/images/train").mkdir(parents=True)
    (world / "plain/images/train/0.png").write_bytes((world / "colours/val/red/0.png").read_bytes())
    (world / "plain.yaml").write_text(f"path: {world}/plain\ntrain: images/train\nval: images/train\nnames: [green, red]\n")
    assert run(world, train, "--cfg", "tiny-cls.yaml", "--data", "plain.yaml", "--hyp", "hyp.yaml", "--workers", "0") == 1
    assert "lies in a folder of a class" in capsys.readouterr().err
    assert run(world, train, "--cfg", "yolov8n.yaml", "--data", "colours", "--imgsz", "32", "--workers", "0") == 1
    assert "a folder for each class, without places of objects" in capsys.readouterr().err
