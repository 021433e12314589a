"""Validation: evaluate() with a model that knows the answers, and the command line on a small data set."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import val
from engine.evaluation.evaluate import EvaluationOptions, Share, evaluate
from models import build_model
from models.checkpoints.checkpoint import Checkpoint, save_checkpoint
from tasks import DETECT
from utils import distributed
from utils.boxes import cxcywh_to_xyxy
from utils.cli.val_arguments import ValConfig, parse_arguments
from utils.errors import UserError
from utils.metrics.metrics import GroundTruth, MetricAccumulator
from utils.types import Batch, Detections, Letterbox, Predictions, Targets

NAMES = ("disc", "box")
SIZE = 64


def batch(number: int) -> Batch:
    """Two images of 100 x 200 px, shrunk to a third and padded; the second has no object."""
    targets = torch.tensor([[0, 0, 0.5, 0.5, 0.25, 0.25], [0, 1, 0.25, 0.5, 0.25, 0.125]])
    boxed = Letterbox(torch.tensor([[100, 200]] * 2), torch.full((2, 2), 0.3), torch.tensor([[2.0, 17.0]] * 2))
    paths = (f"images/{number}a.jpg", f"images/{number}b.jpg")
    return Batch(torch.full((2, 3, SIZE, SIZE), number, dtype=torch.uint8), Targets.of_rows(targets), paths, boxed, 2)


class Oracle(nn.Module):
    """Answers what is in ``batch()``; the head of a Model in miniature."""

    names, nc, ch, stride, task = NAMES, 2, 3, 32, DETECT

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.head = SimpleNamespace(decode=self.decode)
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        return images + self.weight

    def decode(self, output: Tensor) -> Predictions:
        boxes = cxcywh_to_xyxy(batch(0).targets.boxes * SIZE)
        scores = torch.zeros(len(output), 2, 2)
        scores[0, 0, 0], scores[0, 1, 1] = 0.9, 0.8
        return Predictions(boxes.expand(len(output), -1, -1), scores)


QUIET = EvaluationOptions(progress=False)


class MeanPixel:
    names = ("box", "cls")

    def __call__(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"box": output.mean() * 255, "cls": output.new_tensor(len(batch.targets))}


def test_boxes_are_compared_in_px_of_the_original_images() -> None:
    accumulator = MetricAccumulator(NAMES)
    metrics = evaluate(Oracle(), [batch(i) for i in range(3)], QUIET, metric=accumulator)
    assert (metrics.map, metrics.images, metrics.rule) == (pytest.approx(1), 6, "coco")
    truth = accumulator.state()["truth"]
    np.testing.assert_allclose(truth[0, 2:6], [(24 - 2) / 0.3, (24 - 17) / 0.3, 16 / 0.3, 16 / 0.3], rtol=1e-5)
    np.testing.assert_allclose(accumulator.state()["detections"][0, 2:6], truth[0, 2:6], rtol=1e-5)


def test_annotations_are_told_the_sizes_of_the_originals() -> None:
    told = []

    def truth_of(paths, *, hws):
        told.append((paths, hws.tolist()))
        return DETECT.ground_truth(batch(0))

    annotations = SimpleNamespace(truth_of=truth_of, ids_of=lambda paths: list(range(len(paths))))
    evaluate(Oracle(), [batch(0)], dataclasses.replace(QUIET, annotations=annotations))
    assert told == [(batch(0).paths, [[100, 200]] * 2)]


@pytest.mark.parametrize("training", [True, False])
def test_model_runs_in_eval_mode_and_returns_to_its_own(training: bool) -> None:
    model = Oracle().train(training)
    evaluate(model, [batch(0)], QUIET)
    assert model.modes == [False]
    assert model.training is training


def test_the_network_reads_the_images_in_its_precision() -> None:
    """A float32 batch would be twice as large, and autocast would only halve it."""
    model, seen = Oracle(), []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    for precision in (None, torch.bfloat16):
        evaluate(model, [batch(0)], dataclasses.replace(QUIET, precision=precision))
    assert seen == [torch.float32, torch.bfloat16]


def test_training_mode_is_restored_after_an_error() -> None:
    model = Oracle().train()
    model.forward = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, [batch(0)], QUIET)
    assert model.training


def test_losses_are_means_over_batches_and_speed_is_per_image() -> None:
    metrics = evaluate(Oracle(), [batch(2), batch(4)], QUIET, loss=MeanPixel())
    assert metrics.losses == pytest.approx({"box": 3, "cls": 2})
    assert set(metrics.speed_ms) == {"pre-process", "inference", "NMS"}
    assert all(v > 0 for v in metrics.speed_ms.values())
    assert evaluate(Oracle(), [batch(2)], QUIET).losses == {}


def test_shards_of_other_ranks_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has seen the second batch, and the first once more as padding."""
    other = MetricAccumulator(NAMES)
    evaluate(Oracle(), [batch(1), batch(0)], QUIET, metric=other)
    state = Share(other.state(), {"pre-process": 1.0, "inference": 2.0, "NMS": 3.0}, 4)
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, state] if isinstance(value, Share) else [value])
    metrics = evaluate(Oracle(), [batch(0)], QUIET)
    assert (metrics.images, int(metrics.instances.sum()), metrics.map) == (4, 4, pytest.approx(1))
    assert metrics.speed_ms["NMS"] > 3000 / 6


def test_empty_loader_gives_empty_metrics() -> None:
    metrics = evaluate(Oracle(), [], QUIET)
    assert (metrics.images, metrics.map) == (0, 0)


def test_plots_are_saved_when_asked_for(tmp_path: Path) -> None:
    evaluate(Oracle(), [batch(0)], EvaluationOptions(progress=False, plots_dir=tmp_path))
    names = {p.name for p in tmp_path.iterdir()}
    assert {"PR_curve.png", "confusion_matrix.png", "val_batch0_labels.jpg", "val_batch0_pred.jpg"} <= names


def test_hybrid_labels_hold_each_object_once() -> None:
    truth = GroundTruth.of_boxes(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([[10.0, 10.0, 20.0, 20.0], [0.0, 0.0, 9.0, 9.0]]))
    found = Detections(
        torch.tensor([[11.0, 10.0, 30.0, 30.0], [11.0, 10.0, 30.0, 30.0], [80.0, 80.0, 90.0, 90.0]]),
        torch.tensor([0.9, 0.8, 0.7]),
        torch.tensor([1, 0, 1]),
    )
    hybrid = DETECT.add_truth(found, truth, image=0)
    assert hybrid.scores.tolist() == pytest.approx([1, 0.8, 0.7])
    assert hybrid.classes.tolist() == [1, 0, 1]
    assert len(DETECT.add_truth(found[:0], truth, image=5)) == 0


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images with YOLO labels and COCO JSON, and a checkpoint of an untrained network."""
    root = tmp_path_factory.mktemp("data set")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for split in ("images/val", "labels/val", "annotations"):
        (root / split).mkdir(parents=True)
    for i in range(6):
        h, w = (80, 100) if i % 2 else (100, 60)
        cv2.imwrite(str(root / f"images/val/{i}.png"), rng.integers(0, 255, (h, w, 3), dtype=np.uint8))
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": h, "width": w})
        rows = []
        for k in range(i):
            x, y, bw, bh = rng.integers(0, 30, 2).tolist() + rng.integers(9, 30, 2).tolist()
            rows.append(f"{k % 2} {(x + bw / 2) / w} {(y + bh / 2) / h} {bw / w} {bh / h}")
            ids = {"id": len(annotations) + 1, "image_id": 10 + i, "category_id": 5 + k % 2}
            annotations.append({**ids, "bbox": [x, y, bw, bh], "area": bw * bh * 0.7, "iscrowd": 0})
        (root / f"labels/val/{i}.txt").write_text("\n".join(rows))
    categories = [{"id": 5, "name": "disc"}, {"id": 6, "name": "box"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations/instances_val.json").write_text(json.dumps(content))
    (root / "data.yaml").write_text("path: .\ntrain: images/val\nval: images/val\nnames: [disc, box]\n")
    torch.manual_seed(0)
    model = build_model("gelan-t.yaml", nc=2, names=NAMES)
    config = {"data": str(root / "data.yaml")}
    checkpoint = Checkpoint(model.spec.to_dict(), "gelan-t.yaml", NAMES, model.state_dict(), config=config)
    save_checkpoint(root / "best.pt", checkpoint)
    return root


def run(folder: Path, *flags: str, weights: bool = True) -> int:
    given = ["--weights", str(folder / "best.pt")] if weights else []
    common = ["--img", "64", "--batch", "4", "--workers", "0", "--project", str(folder / "runs"), "--device", "cpu"]
    return val.main([*given, *common, *flags])


def test_run_writes_metrics_labels_json_and_plots(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--name", "whole", "--save-json", "--save-txt", "--save-conf", "--conf", "0.0001"]
    assert run(folder, *flags) == 0
    text = capsys.readouterr().out
    assert f"No --data given: {folder / 'data.yaml'}" in text
    assert "instances_val.json" in text
    assert "rule: coco" in text
    assert re.search(r"^ +all +6 +15 ", text, re.MULTILINE)
    out = folder / "runs" / "whole"
    images = {"PR_curve.png", "P_curve.png", "R_curve.png", "F1_curve.png", "confusion_matrix.png", "val_batch0_pred.jpg"}
    assert images <= {p.name for p in out.iterdir()}
    rows = json.loads((out / "best_predictions.json").read_text())
    assert {r["category_id"] for r in rows} <= {5, 6}
    assert {r["image_id"] for r in rows} <= set(range(10, 16))
    assert len(rows) > 50
    label = next((out / "labels").glob("*.txt")).read_text().splitlines()[0].split()
    assert len(label) == 6
    assert all(0 <= float(v) <= 1 for v in label[1:])


def test_another_rule_is_named_in_the_table_and_hybrid_labels_hold_the_objects(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--ap-rule", "yolov5", "--save-hybrid", "--save-conf", "--name", "hybrid") == 0
    text = capsys.readouterr().out
    assert "rule: yolov5" in text
    assert "rule: coco" not in text
    rows = (folder / "runs/hybrid/labels/5.txt").read_text().splitlines()
    assert sum(row.endswith(" 1") for row in rows) == 5


def test_single_class(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model("gelan-t.yaml", nc=1, names=("item",))
    one = folder / "one.pt"
    save_checkpoint(one, Checkpoint(model.spec.to_dict(), "gelan-t.yaml", ("item",), model.state_dict()))
    flags = ["--weights", str(one), "--data", str(folder / "data.yaml"), "--single-cls", "--save-json"]
    assert run(folder, *flags, weights=False) == 0
    assert re.search(r"^ +item +5 +15 ", capsys.readouterr().out, re.MULTILINE)


def test_fixed_size_exported_file_is_validated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from models import load_model
    from models.export.exporting import ExportOptions, export_model

    export_model(load_model(folder / "best.pt"), "onnx", folder / "fixed.onnx", ExportOptions(imgsz=(96, 96), batch_size=4))
    flags = ["--weights", str(folder / "fixed.onnx"), "--data", str(folder / "data.yaml")]
    assert run(folder, *flags, weights=False) == 0
    text = capsys.readouterr().out
    assert "96 px, which is taken in place of --imgsz 64" in text
    assert re.search(r"^ +all +6 +15 ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "study", "--study-sizes", "16"], "--study-sizes 16"),
        (["--task", "fast"], "--task 'fast': one of train, val, test, speed, study"),
        (["--dnn"], "--dnn"),
        (["--slice", "20"], "--slice 20: whole numbers of at least 32 are needed"),
        (["--slice", "640", "480", "320"], "--slice 640 480 320"),
        (["--slice", "640", "--slice-overlap", "0.95"], "--slice-overlap 0.95"),
        (["--slice-overlap", "0.5"], "belongs to --slice"),
        (["--half"], "--half: needs a GPU"),
        (["--conf", "1.5"], "--conf-thres 1.5"),
        (["--batch", "0"], "--batch-size 0"),
        (["--ap-rule", "voc"], "coco, yolov5, ultralytics"),
        (["--img", "64", "96"], "--imgsz 64 96"),
        (["--weights", "a.pt", "b.pt"], "a.pt"),
        (["--weights", "nowhere.pt"], "nowhere.pt"),
        (["--weights", "nowhere.onnx", "--data", "shapes.yaml"], "nowhere.onnx"),
        (["--weights", "nowhere.onnx"], "--data"),
        (["--data", "nowhere.yaml"], "nowhere.yaml"),
        (["--task", "test"], "'test'"),
    ],
)
def test_unsupported_requests_exit_with_one_line(folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert run(folder, *flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("val.py: ")
    assert message in error
    assert error.count("\n") == 1


def test_classes_must_match_the_data_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder / "three.yaml"
    data.write_text("path: .\nval: images/val\nnames: [a, b, c]\n")
    assert run(folder, "--data", str(data)) == 1
    assert "3 classes" in capsys.readouterr().err


def test_missing_weights_default_to_the_newest_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(folder, weights=False) == 1
    assert "runs/train" in capsys.readouterr().err
    weights = tmp_path / "runs/train/exp/weights"
    weights.mkdir(parents=True)
    (weights / "best.pt").write_bytes((folder / "best.pt").read_bytes())
    assert run(folder, weights=False) == 0
    assert "No --weights given" in capsys.readouterr().out


def test_flag_prefixes_are_understood() -> None:
    flags = ["--weights", "a.pt", "--data", "d", "--batch", "8", "--img", "320", "--conf", "0.01", "--iou", "0.6", "--half", "--save-conf"]
    values = {"weights": "a.pt", "data": "d", "batch_size": 8, "imgsz": 320, "conf_thres": 0.01, "iou_thres": 0.6, "half": True}
    assert parse_arguments(flags) == ValConfig(**values, save_txt=True, save_conf=True)
    assert parse_arguments([]) == ValConfig()
    assert (ValConfig().batch_size, ValConfig().conf_thres, ValConfig().iou_thres, ValConfig().max_det) == (32, None, 0.7, 300)
    with pytest.raises(UserError, match="ap-rule yolov5"):
        parse_arguments(["--v5-metric"])
