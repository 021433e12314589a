"""Segmentation through every script at a tiny size: train, resume, validate, detect, export, hub."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import detect
import export
import train
import val
from engine import load_model
from models.checkpoints.checkpoint import load_checkpoint
from tasks import SEGMENT
from tasks.rows import LabelRow
from tests.e2e.test_fake_cuda_run import gpu, waits_in_training
from utils.config import Hyperparameters, TrainConfig

TINY = """
nc: 80
scales: {n: [1.0, 1.0, 1024]}
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [[3, 4], 1, Segment, [nc, 4, 8]]
"""
FLAGS = "--cfg tiny-seg.yaml --data data.yaml --hyp hyp.yaml --imgsz 64 --epochs 3 --batch-size 4 --workers 0 --optimizer AdamW"
HYP = {"warmup_epochs": 0, "warmup_min_iters": 0, "nbs": 4, "lr0": 0.01, "copy_paste": 0.5, "degrees": 10, "close_mosaic": 1}


def make_world(root: Path) -> Path:
    """Fills a folder with images of bright and dark discs and rings, their labels, a COCO file, a tiny model and a recipe."""
    rng = np.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}]}
    for split, count in (("train", 8), ("val", 4)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(60, 120, (64, 80, 3)).astype(np.uint8)
            label, (x, y), radius = i % 2, rng.integers(20, 44, 2).tolist(), int(rng.integers(10, 18))
            cv2.circle(image, (x, y), radius, (250 * label,) * 3, -1)
            (root / "images" / split / f"{i}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
            angle = np.linspace(0, 2 * np.pi, 25)[:-1]
            outline = (np.stack((np.cos(angle), np.sin(angle)), 1) * radius + (x, y)).clip(0, (80, 64))
            row = " ".join(f"{v:.5f}" for v in (outline / (80, 64)).ravel())
            (root / "labels" / split / f"{i}.txt").write_text(f"{label} {row}\n")
            if split == "val":
                (x1, y1), (x2, y2) = outline.min(0), outline.max(0)
                content["images"].append({"id": i + 1, "file_name": f"{i}.png", "height": 64, "width": 80})
                content["annotations"].append({
                    "id": i + 1, "image_id": i + 1, "category_id": label + 1, "iscrowd": 0, "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": 3.1416 * radius**2, "segmentation": [outline.ravel().tolist()],
                })  # fmt: skip
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [dark, bright]\n")
    (root / "tiny-seg.yaml").write_text(TINY)
    Hyperparameters(**HYP).to_yaml(root / "hyp.yaml")
    return root


def run(root: Path, script, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return script.main([*arguments, "--device", "cpu", "--project", "runs"])


def trained(root: Path, name: str, *arguments: str) -> int:
    flags = FLAGS.split()
    return run(root, train, *flags, "--name", name, *arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = make_world(tmp_path_factory.mktemp("segment"))
    assert trained(root, "whole", "--task", "segment") == 0
    return root


def best(world: Path) -> str:
    return str(world / "runs" / "whole" / "weights" / "best.pt")


def test_training_writes_the_columns_and_figures_of_boxes_and_masks(world):
    folder = world / "runs" / "whole"
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert {"train/seg_loss", *SEGMENT.columns} <= rows[0].keys()
    files = {p.name for p in folder.iterdir()}
    assert {"train_batch0.jpg", "val_batch0_labels.jpg", "val_batch0_pred.jpg", "BoxPR_curve.png", "MaskPR_curve.png"} <= files
    numbers = json.loads((folder / "metrics.json").read_text())
    assert set(numbers["metrics"]) == set(SEGMENT.columns)
    assert "AP75" in numbers["mask"]


@pytest.mark.parametrize("head", ["Segment", "Segment26"])
@pytest.mark.usefixtures("same_kernels")
def test_a_step_on_the_fake_device_waits_for_nothing(world, tmp_path, head):
    cfg = tmp_path / f"tiny-{head}.yaml"
    cfg.write_text(("end2end: True\nreg_max: 1" if head == "Segment26" else "") + TINY.replace("Segment,", f"{head},"))
    given = {"cfg": cfg, "data": world / "data.yaml", "hyp": Hyperparameters(**HYP), "project": tmp_path, "amp": "off"}
    with gpu() as seen:
        train.train(TrainConfig(**given, imgsz=64, epochs=1, batch_size=8, workers=0, noplots=True, noval=True))
    assert not waits_in_training(seen)


def test_a_resumed_training_ends_with_the_same_weights_bit_for_bit(world):
    from engine.logging.callbacks import Callback
    from utils.cli.train_arguments import parse_arguments

    class Stop(Callback):
        def on_batch(self, run, epoch, iteration, batch) -> None:
            if (epoch, iteration) == (1, 1):
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        config = parse_arguments([*FLAGS.split(), "--device", "cpu", "--project", "runs", "--name", "stopped", "--task", "segment"])
        with pytest.raises(KeyboardInterrupt):
            train.train(config, callbacks=[Stop()])
        assert train.main(["--resume", "runs/stopped/weights/last.pt"]) == 0
    whole, resumed = (load_checkpoint(world / "runs" / name / "weights" / "last.pt") for name in ("whole", "stopped"))
    assert all(torch.equal(whole.weights[k], resumed.weights[k]) for k in whole.weights)
    assert (world / "runs/whole/results.csv").read_text() == (world / "runs/stopped/results.csv").read_text()


def columns_of(world: Path, name: str) -> dict[str, float]:
    return json.loads((world / "runs" / name / "metrics.json").read_text())["metrics"]


def test_validation_agrees_with_pycocotools_and_with_the_exported_file(world, capsys):
    shared = ["--data", "data.yaml", "--imgsz", "64", "--workers", "0", "--batch-size", "2", "--conf", "0.001"]
    assert run(world, val, "--weights", best(world), *shared, "--save-json", "--save-txt", "--name", "plain") == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("pycocotools")]
    theirs = [float(line.split(" AP ")[1].split(",")[0]) for line in lines]
    ours = columns_of(world, "plain")
    assert [line.startswith("pycocotools (segm)") for line in lines] == [False, True]
    assert theirs == pytest.approx([ours["metrics/mAP_0.5:0.95(B)"], ours["metrics/mAP_0.5:0.95(M)"]], abs=1e-3)
    found = json.loads(next((world / "runs/plain").glob("*_predictions.json")).read_text())
    assert all(set(entry) == {"image_id", "category_id", "bbox", "score", "segmentation"} for entry in found)
    assert export.main(["--weights", best(world), "--imgsz", "64", "64", "--include", "onnx", "--dynamic", "--device", "cpu"]) == 0
    file = str(world / "runs/whole/weights/best.onnx")
    assert run(world, val, "--weights", file, *shared, "--name", "onnx") == 0
    assert columns_of(world, "onnx") == pytest.approx(ours, abs=2e-3)


def test_an_image_whose_masks_need_too_much_memory_is_skipped(world, capsys, monkeypatch):
    large = world / "large"
    large.mkdir(exist_ok=True)
    for name, side in (("a", 64), ("b", 1280), ("c", 64)):
        (large / f"{name}.png").write_bytes(cv2.imencode(".png", np.full((side, side, 3), 200, np.uint8))[1].tobytes())
    monkeypatch.setattr("utils.masks.render.MAX_MASK_BYTES", 300 * 64 * 8)
    flags = ("--source", str(large), "--imgsz", "64", "--conf-thres", "0.0001", "--nosave", "--save-txt", "--name", "skipped")
    assert run(world, detect, "--weights", best(world), *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(f"skipped: {large / 'b.png'}: ") and "masks of 1280x1280 px need" in line]) == 1
    assert any("objects in 2 images, 1 skipped" in line for line in lines)


def test_detection_draws_masks_and_writes_polygons(world, capsys):
    flags = ["--source", "images/val", "--imgsz", "64", "--conf", "0.001", "--max-det", "5", "--save-txt", "--save-json", "--save-crop"]
    for name, more in {
        "masks": [], "sliced": ["--slice", "40"], "views": ["--augment"], "retina": ["--retina-masks"],
    }.items():  # fmt: skip
        assert run(world, detect, "--weights", best(world), *flags, *more, "--name", name) == 0
        folder = world / "runs" / name
        texts = [p.read_text().splitlines() for p in sorted((folder / "labels").iterdir())]
        rows = [SEGMENT.parse_row(line.split()) for text in texts for line in text]
        assert rows
        assert any(isinstance(row, LabelRow) and len(row.polygon) > 4 for row in rows), name
        assert (folder / "0.png").is_file()
        assert (folder / "crops").is_dir()
        entries = json.loads((folder / "predictions.json").read_text())
        assert len(entries) == sum(map(len, texts))
        assert all(entry["segmentation"]["size"] == [64, 80] for entry in entries)
    same = {name: sorted(p.read_text() for p in (world / "runs" / name / "labels").iterdir()) for name in ("masks", "retina")}
    assert same["masks"] == same["retina"]
    both = ["--weights", best(world), str(world / "runs/whole/weights/last.pt")]
    assert run(world, detect, *both, *flags, "--name", "ensemble") == 0


def test_the_hub_model_gives_masks(world):
    model = load_model(best(world), device="cpu")
    model.conf = 0.0001
    image = cv2.imread(str(world / "images/val/0.png"))[:, :, ::-1]
    result = model(np.ascontiguousarray(image), size=64)
    assert len(result.masks) == len(result.xyxy[0]) > 0
    assert result.masks.data.shape == (len(result.masks), 64, 80)
    assert len(result.masks.xy) == len(result.masks.xyn) == len(result.masks)
    assert model([image, image], size=64)[1].masks.hw == (64, 80)
    assert result.render()[0].shape == (64, 80, 3)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--task", "pose"], "--task pose: tiny-seg.yaml is for the task 'segment'; give --cfg yolov8n-pose.yaml"),
        (["--task", "segments"], "--task"),
    ],
)
def test_another_task_than_the_models_is_one_line(world, capsys, flags, says):
    assert trained(world, "refused", *flags) != 0
    assert says in capsys.readouterr().err
    assert not (world / "runs" / "refused").exists()


def test_a_set_of_boxes_is_one_line(world, capsys):
    (world / "labels/boxes").mkdir(parents=True)
    (world / "images/boxes").mkdir()
    (world / "images/boxes/0.png").write_bytes((world / "images/val/0.png").read_bytes())
    (world / "labels/boxes/0.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (world / "boxes.yaml").write_text("path: .\ntrain: images/boxes\nval: images/boxes\nnames: [dark, bright]\n")
    assert trained(world, "refused", "--data", "boxes.yaml") != 0
    assert "none of its 1 objects has an outline" in capsys.readouterr().err
