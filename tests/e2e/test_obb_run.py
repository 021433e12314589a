"""Oriented boxes through train.py, val.py, detect.py, export.py and a resume, with both forms of the head."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import detect
import export
import train
import val
from engine.inference.slicing import WindowDetections, merge_windows
from models import build_model
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.export.model import load_exported
from tasks import OBB
from tests.e2e.test_fake_cuda_run import gpu, waits_in_training
from tests.e2e.test_resume import Signal, assert_equal_runs
from tests.golden import fill_, image_array
from tests.tiny_training import HYP, config, make_world
from utils.config import TrainConfig
from utils.rotated.boxes import corners_of, rotated_boxes, unrotated
from utils.types import Detections

ROWS = """
nc: 80
scales: {{n: [1.0, 1.0, 1024]}}
{keys}
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 1, 1]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [[3, 4], 1, {head}, [nc, 1]]
"""
FORMS = {"v8": {"keys": "", "head": "OBB"}, "v26": {"keys": "end2end: True\nreg_max: 1", "head": "OBB26"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The labels are rows of four corners and, of every other image, plain boxes."""
    root = make_world(tmp_path_factory.mktemp("world"))
    for name, form in FORMS.items():
        (root / f"tinyn-{name}.yaml").write_text(ROWS.format(**form))
    for path in sorted((root / "labels").rglob("*.txt"))[::2]:
        label, x, y, w, h = path.read_text().split()
        box = torch.tensor((float(x), float(y), float(w), float(h), 0.2))
        path.write_text(" ".join((label, *(f"{v:.6f}" for v in corners_of(box).flatten().tolist()))) + "\n")
    return root


@pytest.fixture(scope="module", params=FORMS)
def weights(request, world, tmp_path_factory) -> Path:
    """A filled network whose scores differ from cell to cell."""
    model = fill_(build_model(world / f"tinyn-{request.param}.yaml", names=("dark", "bright")), 1.35)
    if request.param == "v26":
        for tower in (*model.head.cv2, *model.head.one2one_cv2):
            torch.nn.init.constant_(tower[-1].bias, 2.0)
    path = tmp_path_factory.mktemp("run") / "best.pt"
    name = f"tinyn-{request.param}.yaml"
    save_checkpoint(path, Checkpoint(cfg=model.spec.to_dict(), cfg_name=name, names=model.names, weights=model.state_dict()))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_a_training_writes_the_columns_and_resumes_bit_for_bit(world, tmp_path, form):
    given = {"cfg": world / f"tinyn-{form}.yaml", "epochs": 2, "hyp": HYP.replace(degrees=20.0)}
    whole = train.train(config(world, tmp_path / "whole", **given)).save_dir
    with (whole / "results.csv").open() as file:
        header = next(csv.reader(file))
    assert {"train/angle_loss", "val/angle_loss", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95(prob)"} <= set(header)
    with pytest.raises(KeyboardInterrupt, match="resume with --resume"):
        train.train(config(world, tmp_path / "again", **given), callbacks=(Signal(0, 2),))
    last = tmp_path / "again" / "exp" / "weights" / "last.pt"
    assert_equal_runs(whole, train.train(TrainConfig(resume=last)).save_dir)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("same_kernels")
def test_a_step_on_the_fake_device_waits_for_nothing(world, tmp_path, form):
    given = {"cfg": world / f"tinyn-{form}.yaml", "epochs": 1, "amp": "off", "deterministic": True}

    def trained(name: str) -> dict[str, torch.Tensor]:
        result = train.train(config(world, tmp_path / name, **given))
        return load_checkpoint(result.save_dir / "weights" / "last.pt").weights

    expected = trained("cpu")
    with gpu() as seen:
        got = trained("gpu")
    assert max((got[k].double() - v.double()).abs().max() for k, v in expected.items()) < 1e-6
    assert not waits_in_training(seen)
    assert not seen.nondeterministic


def look(weights: Path, world: Path, folder: Path, capsys) -> tuple[list[str], list[str]]:
    """What val.py says of all classes, and what detect.py says of each image, without the time."""
    common = ["--weights", str(weights), "--imgsz", "64", "--project", str(folder)]
    assert val.main([*common, "--data", str(world / "data.yaml"), "--workers", "0", "--save-json"]) == 0
    assert detect.main([*common, "--source", str(world / "images" / "val"), "--conf-thres", "0.52", "--save-txt", "--save-crop"]) == 0
    shown = capsys.readouterr().out.splitlines()
    return [x for x in shown if x.split()[:1] == ["all"]], [x.rsplit(",", 1)[0] for x in shown if x.startswith("image ")]


def test_weights_and_their_onnx_file_answer_alike(weights, world, tmp_path, capsys):
    copied = tmp_path / "best.pt"
    copied.write_bytes(weights.read_bytes())
    (made,) = export.export(export.ExportConfig(weights=str(copied), imgsz=(64, 64), dynamic=True, include=("onnx",)))
    exported = load_exported(made.path)
    images = image_array(0, (1, 3, 64, 64))
    found = exported.predict(images)
    assert found.fields["angle"].shape == (1, found.boxes.shape[1], 1)
    assert exported.run(images)[0].shape[1:] == ((300, 7) if found.unique else (7, 80))
    capsys.readouterr()
    ours, theirs = (look(path, world, tmp_path / path.suffix[1:], capsys) for path in (weights, made.path))
    assert ours == theirs
    assert len(ours[0]) == 1
    assert len(ours[1]) == 4
    rows = [row for path in (tmp_path / "pt").rglob("labels/*.txt") for row in path.read_text().splitlines()]
    assert rows
    assert {len(row.split()) for row in rows} == {9}
    assert {path.name for path in (tmp_path / "pt").rglob("Task1_*.txt")} == {"Task1_dark.txt", "Task1_bright.txt"}
    line = next(path.read_text().splitlines()[0] for path in (tmp_path / "pt").rglob("Task1_*.txt") if path.read_text())
    assert len(line.split()) == 10


def test_windows_of_an_image_are_merged_by_the_polygons(weights, world, tmp_path, capsys):
    common = ["--weights", str(weights), "--imgsz", "64", "--source", str(world / "images" / "val"), "--project", str(tmp_path)]
    assert detect.main([*common, "--conf-thres", "0.52", "--slice", "48"]) == 0
    assert "and 4 windows" in capsys.readouterr().out


def merged(*rows: tuple[float, ...]) -> list[float]:
    """Scores that stay of rows (cx, cy, w, h, angle, score, window) in an image of 100 px; window 0 is the whole."""
    windows = torch.tensor(((0.0, 0, 100, 100), (0, 0, 60, 100), (40, 0, 100, 100)))
    values = torch.tensor(rows)
    boxes, angle = unrotated(values[:, :5])
    view = values[:, 6].long()
    detections = Detections(boxes, values[:, 5], torch.zeros(len(rows)).long(), {"angle": angle})
    found = merge_windows(WindowDetections(detections, windows[view], view), (100, 100), iou=0.45, max_det=10, task=OBB)
    return [round(score, 2) for score in found.scores.tolist()]


def test_boxes_of_windows_that_are_one_object_are_recognised():
    assert merged((50, 50, 20, 6, 0.7, 0.9, 0), (50, 50, 20, 6, 0.7, 0.8, 1)) == [0.9]
    assert merged((50, 50, 20, 6, 0.7, 0.9, 0), (50, 50, 20, 6, -0.7, 0.8, 1)) == [0.9, 0.8], "two that cross"
    assert merged((58, 50, 30, 8, 0.5, 0.6, 0), (52, 47, 17, 8, 0.5, 0.9, 1)) == [0.6], "a piece of the whole, though with a better score"
    assert merged((20, 20, 10, 4, 0.3, 0.9, 1), (80, 80, 10, 4, 0.3, 0.8, 2)) == [0.9, 0.8]


def test_test_time_augmentation_is_refused_by_name(weights, world, tmp_path, capsys):
    common = ["--weights", str(weights), "--imgsz", "64", "--source", str(world / "images" / "val"), "--project", str(tmp_path)]
    assert detect.main([*common, "--augment"]) == 1
    assert "results of the task 'obb' also have angle" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "no empty run folder is left"


def test_drawn_boxes_are_turned(weights):
    image = np.zeros((80, 80, 3), np.uint8)
    boxes, angle = unrotated(torch.tensor(((40.0, 40, 40, 10, 0.7853982),)))
    from tasks.base import DrawStyle

    found = Detections(boxes, torch.ones(1), torch.zeros(1).long(), {"angle": angle})
    drawn = OBB.draw(image, found, ("a",), DrawStyle(line_thickness=1, hide_labels=True))
    assert drawn.any()
    corners = corners_of(rotated_boxes(boxes, angle))[0]
    for x, y in corners.tolist():
        assert drawn[max(round(y) - 1, 0) : round(y) + 2, max(round(x) - 1, 0) : round(x) + 2].any()
    assert not drawn[35:45, 15:25].any(), "where the box would be if it were not turned"
