"""--slice in detect.py and val.py: small shapes in a large image, found by a network that is trained here in seconds.

The network knows shapes of some 6 to 60 px. Whole images of 2560 px reach it at a quarter of their size, windows of 640 px as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import detect
import val
from data.tools.shapes import NAMES, draw_image
from models import build_model, load_model
from models.checkpoints.checkpoint import Checkpoint, save_checkpoint
from models.export.exporting import ExportOptions, export_model
from tests.large_image import SIZES_PX, LargeImage, large_image, recall_by_size
from utils.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from utils.cli.detect_arguments import DetectConfig
from utils.cli.val_arguments import ValConfig
from utils.config import Hyperparameters
from utils.types import Batch, Detections, Letterbox, Targets, to_unit_range

STEPS, BATCH, SIDE = 200, 16, 80
SHRUNK = 0.35  # of the training images
SMALL, SMALLISH, MIDDLE, LARGE = SIZES_PX
Run = Callable[..., Detections]


def crops(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Shrunk images of shapes: (SIDE, SIDE, 3) and the boxes on them, (n, 4) cxcywh, normalised."""
    found = []
    for i in range(count):
        image, _, boxes = draw_image(np.random.default_rng([9, i]))
        hw = round(image.shape[0] * SHRUNK), round(image.shape[1] * SHRUNK)
        boxes = np.array(boxes) * np.tile((hw[1] / image.shape[1], hw[0] / image.shape[0]), 2)
        corner = np.random.default_rng([8, i]).integers(0, (hw[1] - SIDE + 1, hw[0] - SIDE + 1))
        image = cv2.resize(image, hw[::-1], interpolation=cv2.INTER_AREA)[corner[1] :, corner[0] :][:SIDE, :SIDE]
        inside = np.clip(boxes - np.tile(corner, 2), 0, SIDE)
        areas = [(b[:, 2:] - b[:, :2]).prod(1) for b in (inside, boxes)]
        kept = inside[(areas[0] > 0.5 * areas[1]) & ((boxes[:, 2:] - boxes[:, :2]).min(1) > 5)]
        found.append((image, xyxy_to_cxcywh(torch.from_numpy(kept / SIDE)).numpy()))
    return found


def batch(pool: list[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator) -> Batch:
    """Images drawn from the pool, some mirrored."""
    images, rows = [], []
    for i, drawn in enumerate(rng.integers(len(pool), size=BATCH)):
        image, boxes = pool[drawn]
        mirrored = bool(rng.integers(2))
        images.append(image[:, ::-1] if mirrored else image)
        boxes = np.stack((1 - boxes[:, 0], *boxes[:, 1:].T), 1) if mirrored else boxes
        rows.append(np.column_stack((np.full(len(boxes), i), np.zeros(len(boxes)), boxes)))
    nowhere = Letterbox(*(torch.zeros(BATCH, 2) for _ in range(3)))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return Batch(pixels, Targets.of_rows(torch.from_numpy(np.concatenate(rows)).float()), ("",) * BATCH, nowhere, max(map(len, rows)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with one head of stride 4 and one class, trained for a few seconds."""
    backbone = [[-1, 1, "Conv", [12, 3, 2]], [-1, 1, "Conv", [24, 3, 2]], [-1, 1, "Conv", [24, 3, 1]]]
    cfg = {"nc": 1, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": 3, "backbone": backbone, "head": [[[2], 1, "DDetect", ["nc"]]]}
    torch.manual_seed(0)
    model = build_model(cfg, names=("shape",)).train()
    loss, pool, rng = model.head.build_loss(Hyperparameters()), crops(120), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=STEPS)
    for _ in range(STEPS):
        drawn = batch(pool, rng)
        total = sum(loss(model(to_unit_range(drawn.images)), drawn).values()) * BATCH
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    path = tmp_path_factory.mktemp("weights") / "shape.pt"
    save_checkpoint(path, Checkpoint(cfg, "small.yaml", ("shape",), model.state_dict()))
    return path


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LargeImage]:
    """An image of 2560 px, as a file too; all its objects are of one class."""
    path, truth = tmp_path_factory.mktemp("mosaic") / "large.png", large_image(0)
    cv2.imwrite(str(path), truth.image[:, :, ::-1], (cv2.IMWRITE_PNG_COMPRESSION, 1))
    return path, truth._replace(classes=np.zeros_like(truth.classes))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two images of 1280 px, with less than the 100 objects that COCO counts, and an empty one smaller than any window."""
    root, images, annotations = tmp_path_factory.mktemp("set"), [], []
    for folder in ("images/val", "labels/val", "annotations"):
        (root / folder).mkdir(parents=True)
    blank = LargeImage(np.full((90, 120, 3), 90, np.uint8), np.zeros(0, int), np.zeros((0, 4), np.float32))
    for i, truth in enumerate((large_image(2, side=1280), large_image(3, side=1280), blank)):
        assert len(truth.classes) < 100
        cv2.imwrite(str(root / f"images/val/{i}.png"), truth.image[:, :, ::-1], (cv2.IMWRITE_PNG_COMPRESSION, 1))
        (root / f"labels/val/{i}.txt").write_text(truth._replace(classes=np.zeros_like(truth.classes)).yolo_rows())
        images.append({"id": i, "file_name": f"{i}.png", "height": truth.image.shape[0], "width": truth.image.shape[1]})
        for x1, y1, x2, y2 in truth.boxes_xyxy.tolist():
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": 0, **box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "shape"}]}
    (root / "annotations/instances_val.json").write_text(json.dumps(content))
    (root / "data.yaml").write_text("path: .\ntrain: images/val\nval: images/val\nnames: [shape]\n")
    return root


@pytest.fixture
def found(tmp_path: Path, weights: Path) -> Run:
    """What detect.py writes of a square image."""

    def call(source: Path, *flags: str | Path, side: int = 384) -> Detections:
        out = ["--project", str(tmp_path), "--name", "run", "--exist-ok", "--nosave", "--save-txt", "--save-conf", "--device", "cpu"]
        assert detect.main(["--weights", str(weights), "--source", str(source), *map(str, flags), *out]) == 0
        path = tmp_path / f"run/labels/{source.stem}.txt"
        rows = torch.from_numpy(np.loadtxt(path, ndmin=2)).float() if path.exists() else torch.zeros(0, 6)
        path.unlink(missing_ok=True)
        return Detections(cxcywh_to_xyxy(rows[:, 1:5]) * side, rows[:, 5], rows[:, 0].long())

    return call


def test_slicing_finds_small_shapes_missed_in_the_whole_image(
    found: Run, mosaic: tuple[Path, LargeImage], capsys: pytest.CaptureFixture[str]
) -> None:
    path, truth = mosaic
    plain, sliced = found(path, side=2560), found(path, "--slice", "640", "--slice-overlap", "0.2", side=2560)
    before, after = (recall_by_size(d, truth) for d in (plain, sliced))
    assert "640x640 and 25 windows" in capsys.readouterr().out
    print(f"recall by size, plain {before} of {len(plain.scores)} boxes, sliced {after} of {len(sliced.scores)}")
    assert before[SMALL][1] == 24
    assert before[SMALL][0] <= 1
    assert after[SMALL][0] >= 8
    assert after[SMALLISH][0] >= before[SMALLISH][0] + 30
    for size in (MIDDLE, LARGE):  # what the whole image shows is not lost
        assert after[size][0] >= 0.9 * before[size][0]


def test_metrics_of_validation_are_those_of_the_merged_boxes(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"weights": str(weights), "data": str(data / "data.yaml"), "imgsz": 320, "workers": 0, "device": "cpu", "project": tmp_path}
    plain = val.validate(ValConfig(**common, name="plain"))
    capsys.readouterr()
    sliced = val.validate(ValConfig(**common, batch_size=2, name="sliced", slice=(320, 320), save_txt=True, save_json=True, save_conf=True))
    assert plain.images == sliced.images == 3
    assert plain.map_by_size[0] < 0.15
    assert sliced.map_by_size[0] > plain.map_by_size[0] + 0.15
    text = capsys.readouterr().out
    print(f"mAP by size: plain {plain.map_by_size}, sliced {sliced.map_by_size}")
    assert f"pycocotools: AP {sliced.map:.3f}, AP50 {sliced.map50:.3f}, " in text
    rows = json.loads((tmp_path / "sliced/shape_predictions.json").read_text())
    corners = np.array([r["bbox"] for r in rows])
    assert 1250 < (corners[:, :2] + corners[:, 2:]).max() <= 1280.01
    assert sum(len(p.read_text().splitlines()) for p in (tmp_path / "sliced/labels").iterdir()) == len(rows)
    assert (tmp_path / "sliced/val_batch0_pred.jpg").is_file()


def test_val_is_unchanged_for_images_that_fit_one_window(data: Path, weights: Path, tmp_path: Path) -> None:
    flags = ["--weights", str(weights), "--data", str(data / "data.yaml"), "--workers", "0", "--device", "cpu", "--project", str(tmp_path)]
    for name, more in (("plain", []), ("sliced", ["--slice", "1280"])):
        assert val.main([*flags, "--img", "160", "--name", name, "--save-json", *more]) == 0
    first, second = ((tmp_path / name / "shape_predictions.json").read_text() for name in ("plain", "sliced"))
    assert first == second


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 384 px, of shapes at half their size."""
    path = tmp_path_factory.mktemp("smaller") / "smaller.png"
    cv2.imwrite(str(path), cv2.resize(large_image(1, side=768).image[:, :, ::-1], (384, 384), interpolation=cv2.INTER_AREA))
    return path


def test_exported_files_detect_the_same(found: Run, smaller: Path, weights: Path, tmp_path: Path) -> None:
    flags = ("--slice", "160", "200", "--conf", "0.4")
    for name, file, options in (
        ("onnx", "fixed.onnx", ExportOptions(imgsz=(160, 160), batch_size=3)),
        ("torchscript", "dynamic.torchscript", ExportOptions(imgsz=(160, 160), dynamic=True)),
    ):
        export_model(load_model(weights), name, tmp_path / file, options)
    expected = found(smaller, *flags, "--img", "160")
    assert len(expected.scores) > 10
    dynamic = found(smaller, *flags, "--img", "160", "--weights", tmp_path / "dynamic.torchscript")
    np.testing.assert_allclose(dynamic.boxes, expected.boxes, atol=0.1)
    fixed = found(smaller, *flags, "--weights", tmp_path / "fixed.onnx")  # square windows have another border
    assert abs(len(fixed.scores) - len(expected.scores)) <= 3


def test_slice_combines_with_other_flags(found: Run, smaller: Path) -> None:
    flags = ("--img", "192", "--slice", "192")
    usual = found(smaller, *flags)
    assert len(found(smaller, *flags, "--augment").scores) > len(usual.scores) / 2
    assert len(found(smaller, *flags, "--max-det", "5").scores) == 5
    assert torch.equal(found(smaller, *flags, "--classes", "0", "--agnostic-nms").boxes, usual.boxes)
    assert found(smaller, *flags, "--max-det", "5", "--conf", "0.999").boxes.shape == (0, 4)


def test_every_frame_of_a_video_is_sliced(weights: Path, smaller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (384, 384))
    if not writer.isOpened():
        pytest.skip("this OpenCV cannot write videos")
    for _ in range(3):
        writer.write(cv2.imread(str(smaller)))
    writer.release()
    config = {"weights": weights, "source": tmp_path / "clip.mp4", "imgsz": 192, "device": "cpu", "project": tmp_path}
    plain, sliced = (detect.detect(DetectConfig(**config, slice=size)) for size in (None, (192,)))
    assert plain.frames == sliced.frames == 3
    assert sliced.detections > plain.detections
    assert len(re.findall(r"192x192 and 9 windows \d+ shape", capsys.readouterr().out)) == 3


@pytest.mark.slow
def test_slicing_raises_recall_of_the_demo_network(mosaic: tuple[Path, LargeImage], tmp_path: Path) -> None:
    """The network of ``make demo``: six classes, 16 epochs at 160 px on the embedded data set."""
    from train import train
    from utils.config import TrainConfig

    trained = train(TrainConfig(device="cpu", project=str(tmp_path)))
    truth, recalls = large_image(0), []
    for size in (None, (640, 640)):
        config = {"weights": trained.best_weights, "source": mosaic[0], "project": tmp_path / "found", "device": "cpu"}
        report = detect.detect(DetectConfig(**config, slice=size, save_conf=True, nosave=True))
        rows = torch.from_numpy(np.loadtxt(report.folder / "labels/large.txt", ndmin=2)).float()
        recalls.append(recall_by_size(Detections(cxcywh_to_xyxy(rows[:, 1:5]) * 2560, rows[:, 5], rows[:, 0].long()), truth))
    print(f"{len(NAMES)} classes, recall by size: plain {recalls[0]}, sliced {recalls[1]}")
    assert recalls[0][SMALL][0] <= 1
    assert recalls[1][SMALL][0] >= 8
