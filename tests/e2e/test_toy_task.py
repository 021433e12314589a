"""A task of a user's own, from one plugin file, through every script: the file that docs/extending.md shows under "A task"."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

import detect
import export
import train
import val
from tests.e2e.test_extending_page import section
from tests.tiny_training import HYP, TINY

NAMES = ("dark", "bright")


def make_dots(root: Path, *, train: int = 12, val: int = 4) -> Path:
    """Fills a folder with images of one dark or bright dot, labels ``class x y``, a tiny model and the page's plugin."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(100, 130, (64, 64, 3)).astype(np.uint8)
            label, x, y = i % 2, *rng.integers(12, 52, 2).tolist()
            cv2.circle(image, (x, y), 4, (250 * label,) * 3, -1)
            (root / "images" / split / f"{i}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
            (root / "labels" / split / f"{i}.txt").write_text(f"{label} {(x + 0.5) / 64} {(y + 0.5) / 64}\n")
    (root / "dots.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [{', '.join(NAMES)}]\n")
    (root / "points-v9.yaml").write_text(TINY.format(block="Conv, [16, 1, 1]").replace("DDetect", "PointDetect"))
    (root / "my_points.py").write_text(section("A task").block("python"), encoding="utf-8")
    HYP.to_yaml(root / "hyp.yaml")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and a training of two epochs in ``runs/exp``."""
    root = make_dots(tmp_path_factory.mktemp("dots"))
    data = ["--cfg", "points-v9.yaml", "--data", "dots.yaml", "--hyp", "hyp.yaml"]
    assert run(root, train, *data, "--epochs", "2", "--batch-size", "4", "--workers", "0", "--image-weights") == 0
    return root


def run(root: Path, script, *arguments: str) -> int:
    """A script's ``main`` with the plugin, as from the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return script.main([*arguments, "--imgsz", "64", "--device", "cpu", "--project", "runs", "--plugins", "my_points.py"])


def test_training_writes_the_columns_and_figures_of_the_task(world):
    folder = world / "runs/exp"
    rows = list(csv.DictReader((folder / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert [name for name in rows[0] if name.startswith("metrics/")] == [
        "metrics/precision", "metrics/recall", "metrics/AP_near", "metrics/AP",
    ]  # fmt: skip
    assert len(rows) == 2
    assert all(0 <= float(row["metrics/AP"]) <= 1 for row in rows)
    written = {p.name for p in folder.iterdir()}
    assert {"labels.jpg", "train_batch0.jpg", "val_batch0_pred.jpg", "results.png", "PR_curve.png", "confusion_matrix.png"} <= written
    assert (folder / "weights/best-deploy.pt").exists()


def test_validation_and_a_study_of_the_deployed_form_agree(world, capsys):
    assert run(world, val, "--weights", "runs/exp/weights/best.pt", "--save-txt", "--save-hybrid", "--name", "hybrid") == 0
    study = ["--weights", "runs/exp/weights/best-deploy.pt", "--task", "study", "--study-sizes", "64", "--name", "study"]
    assert run(world, val, *study) == 0
    whole, deployed = (line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["all"])
    assert whole == deployed
    header = (world / "runs/study/study.csv").read_text().splitlines()[0]
    assert header.startswith("weights,imgsz,batch,P,R,AP_near,AP,")
    first = (world / "runs/hybrid/labels/0.txt").read_text().splitlines()[0]  # the object itself
    truth = (world / "labels/val/0.txt").read_text()
    assert [float(v) for v in first.split()] == pytest.approx([float(v) for v in truth.split()], abs=1e-4)


def test_detection_writes_rows_that_the_task_reads(world):
    weights = ["--weights", "runs/exp/weights/best.pt", "--conf-thres", "0.0001", "--max-det", "5"]
    assert run(world, detect, *weights, "--source", "images/val", "--save-txt", "--name", "found") == 0
    rows = (world / "runs/found/labels/0.txt").read_text().splitlines()
    assert 0 < len(rows) <= 5
    assert all(len(row.split()) == 3 for row in rows)
    assert (world / "runs/found/0.png").exists()


def test_the_exported_file_finds_the_same_points(world):
    pytest.importorskip("onnxruntime")
    arguments = ["--include", "onnx", "--imgsz", "64", "--plugins", str(world / "my_points.py")]
    assert export.main(["--weights", str(world / "runs/exp/weights/best.pt"), *arguments]) == 0
    points = []
    for suffix in ("pt", "onnx"):
        weights = ["--weights", f"runs/exp/weights/best.{suffix}", "--conf-thres", "0.0001"]
        assert run(world, detect, *weights, "--source", "images/val/1.png", "--save-txt", "--nosave", "--name", suffix) == 0
        lines = (world / f"runs/{suffix}/labels/1.txt").read_text().splitlines()
        points.append(np.array([line.split()[1:] for line in lines], float))
    apart = np.abs(points[0][:, None] - points[1]).max(axis=2)  # (n, n); scores of nearly equal size may change places
    assert apart.min(axis=0).max() < 1e-3
    assert apart.min(axis=1).max() < 1e-3


def test_sliced_and_augmented_inference_take_the_task(world):
    weights = ["--weights", "runs/exp/weights/best.pt", "--conf-thres", "0.0001", "--max-det", "5", "--source", "images/val/1.png"]
    assert run(world, detect, *weights, "--slice", "40", "--nosave", "--save-txt", "--name", "sliced") == 0
    assert run(world, detect, *weights, "--augment", "--nosave", "--save-txt", "--name", "augmented") == 0


def test_what_has_no_form_in_coco_is_refused(world, capsys):
    assert run(world, val, "--weights", "runs/exp/weights/best.pt", "--save-json", "--name", "refused") == 1
    assert "the task 'points' have no form in COCO" in capsys.readouterr().err
