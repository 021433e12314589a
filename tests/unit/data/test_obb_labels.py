"""Labels of oriented boxes: rows in any order and bad ones, targets after augmentation, DOTA's text, and the embedded set."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
import torch

from data.dataset_spec import load_dataset_spec
from data.labels.yolo import read_labels
from data.loader import LoaderOptions, build_loader
from data.tools.convert import main as convert
from data.tools.shapes import VERSION, draw_image, draw_scene
from data.tools.shapes_obb import box_along, label_rows
from tasks import OBB
from tasks.rows import InvalidRow
from tests.image_files import write_images
from utils.instances import Instances
from utils.rotated.boxes import corners_of

BOX = torch.tensor((0.5, 0.4, 0.3, 0.1, 0.6)).double()
CORNERS = corners_of(BOX).flatten().tolist()


def row(values, label="2"):
    return OBB.parse_row([label, *(f"{v:.6f}" for v in values)])


def targets_of(polygon):
    """Of one object in an image of 100 px."""
    points = (polygon * 100).astype(np.float32)
    return OBB.targets(Instances(np.zeros(1, np.float32), np.zeros((1, 4), np.float32), points, np.array([4])), (100, 100))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 3, 0, 1), (3, 2, 1, 0), (0, 2, 1, 3), (2, 0, 1, 3)])
def test_four_corners_in_any_order_are_the_same_box(order):
    corners = np.array(CORNERS).reshape(4, 2)[list(order)]
    parsed = row(corners.ravel())
    assert parsed.class_index == 2
    made = targets_of(parsed.polygon)
    np.testing.assert_allclose(np.append(made["boxes"], made["angle"]), BOX, atol=1e-4)


def test_a_plain_box_is_a_box_of_angle_0():
    parsed = OBB.parse_row(["1", "0.5", "0.5", "0.4", "0.2"])
    np.testing.assert_allclose(parsed.polygon.min(0), (0.3, 0.4))
    np.testing.assert_allclose(parsed.polygon.max(0), (0.7, 0.6))


@pytest.mark.parametrize(
    ("text", "expected", "skips"),
    [
        ("0 0.1 0.1 0.2 0.1 0.2 0.2", "7 columns, expected: class x1 y1", True),
        ("0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2 0.5", "10 columns, expected: class x1 y1", True),
        ("0 10 10 20 10 20 20 10 20", "coordinate 10 in column 2, values normalised to 0-1 are expected", True),
        ("0 0.1 0.1 0.2 nan 0.2 0.2 0.1 0.2", "NaN or infinity", True),
        ("0 0.1 0.1 0.2 x 0.2 0.2 0.1 0.2", "not a number", True),
        ("0 0.1 0.1 0.1 0.1 0.1 0.1 0.1 0.1", "four corners without area inside the image, dropped", False),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4 0.4", "four corners without area inside the image, dropped", False),
        ("0 1.1 0.1 1.3 0.1 1.3 0.3 0.9 0.3", "about a point outside the image", True),
        ("0 0.5 0.5 0 0.2", "a box without area, dropped", False),
    ],
)
def test_bad_rows_are_named_in_a_line(text, expected, skips):
    wrong = OBB.parse_row(text.split())
    assert isinstance(wrong, InvalidRow)
    assert expected in wrong.message
    assert wrong.skips_image is skips


def test_a_corner_outside_the_image_is_kept_and_the_target_shows_what_is_inside():
    parsed = row((-0.1, 0.4, 0.2, 0.4, 0.2, 0.6, -0.1, 0.6))
    np.testing.assert_allclose(parsed.box_cxcywh, (0.1, 0.5, 0.2, 0.2), atol=1e-6)
    made = targets_of(parsed.polygon)
    np.testing.assert_allclose(made["boxes"], [(0.1, 0.5, 0.2, 0.2)], atol=1e-6)


@pytest.mark.parametrize("pad", [0.0, 0.5])
def test_validation_compares_with_whole_boxes_whatever_the_padding(tmp_path, pad):
    box = torch.tensor((25.0, 200.0, 100.0, 40.0, math.pi / 6))
    corners = (corners_of(box) / 640).flatten().tolist()
    path = write_images(tmp_path / "set", {"train": [[]], "val": [[(0, *corners)], [], [(0, 0.5, 0.5, 0.2, 0.1)]]}, side=640)
    options = LoaderOptions(imgsz=320, batch_size=3, hyp=types.SimpleNamespace(), augment=False, rect=pad > 0, pad=pad)
    (batch,) = build_loader(load_dataset_spec(path), "val", options, task=OBB)
    truth = OBB.ground_truth(batch)
    assert truth.image.tolist() == [0, 2]
    found = torch.cat((truth.boxes_ltwh[:, :2] + truth.boxes_ltwh[:, 2:] / 2, truth.boxes_ltwh[:, 2:], truth.fields["angle"]), dim=1)
    torch.testing.assert_close(found.float(), torch.stack((box, torch.tensor((320.0, 320, 128, 64, 0)))), atol=0.01, rtol=0)


def test_flips_turn_the_angle():
    points = (np.array(CORNERS).reshape(4, 2) * 100).astype(np.float32)
    instances = Instances(np.zeros(1, np.float32), np.array(((30, 20, 70, 60),), np.float32), points, np.array([4]))
    made = OBB.targets(instances.mirrored(100), (100, 100))
    assert made["angle"][0] == pytest.approx(-0.6, abs=1e-4)
    np.testing.assert_allclose(made["boxes"], [(0.5, 0.4, 0.3, 0.1)], atol=1e-4)


def dota(folder, rows, *, header=True):
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["imagesource:GoogleEarth", "gsd:0.146"] if header else []
    (folder / "train_0000.txt").write_text("\n".join([*lines, *rows, ""]))
    return folder


def test_dota_text_becomes_rows_of_corners(tmp_path, capsys):
    data = write_images(tmp_path / "a", {"train": [[]]}, side=100)
    (image,) = (data.parent / "images/train").glob("*.*")
    rows = ["10 10 30 10 30 20 10 20 plane 0", "10.0 50.0 30.0 60.0 10.0 60.0 30.0 50.0 small-vehicle 0", "1 1 9 1 9 9 1 9 plane 1"]
    folder = dota(tmp_path / "labelTxt", rows)
    (folder / "train_0000.txt").rename(folder / f"{image.stem}.txt")
    command = ["dota-to-yolo", str(folder), "--images", str(image.parent), "--out", str(tmp_path / "out")]
    assert convert(command) == 0
    assert "2 objects of 2 classes" in capsys.readouterr().out
    (written,) = (tmp_path / "out/images/train").iterdir()
    table = read_labels([str(written)], parse_row=OBB.parse_row, progress=False)
    assert table.classes.tolist() == [0, 1]
    np.testing.assert_allclose(table.boxes_cxcywh, [(0.2, 0.15, 0.2, 0.1), (0.2, 0.55, 0.2, 0.1)], atol=1e-6)
    assert convert([*command, "--exist-ok", "--difficult"]) == 0
    assert "3 objects" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("1 2 3 plane 0", "5 columns, expected: x1 y1"),
        ("1 1 9 1 9 9 1 x plane 0", "not a number"),
        ("1 1 900 1 900 9 1 9 plane 0", "coordinate"),
    ],
)
def test_a_bad_row_of_dota_is_named_with_its_file(tmp_path, capsys, line, expected):
    data = write_images(tmp_path / "a", {"train": [[]]}, side=100)
    (image,) = (data.parent / "images/train").glob("*.*")
    folder = dota(tmp_path / "labelTxt", [line, "1 1 9 1 9 9 1 9 plane 0"])
    (folder / "train_0000.txt").rename(folder / f"{image.stem}.txt")
    assert convert(["dota-to-yolo", str(folder), "--images", str(image.parent), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"{image.stem}.txt:3: " in error
    assert expected in error


def test_the_embedded_scenes_are_those_of_detection_with_a_box_along_each_shape():
    image, classes, boxes = draw_image(np.random.default_rng([VERSION, 1, 3]))
    scene = draw_scene(np.random.default_rng([VERSION, 1, 3]))
    assert (scene.image == image).all()
    h, w = scene.owner.shape
    rows = [OBB.parse_row(line.split()) for line in label_rows(scene).splitlines()]
    assert [r.class_index for r in rows] == classes
    for r, (x1, y1, x2, y2) in zip(rows, boxes):
        px = r.polygon * (w, h)
        assert (px.min(0) <= (x1 + 1, y1 + 1)).all()
        assert (px.max(0) >= (x2 - 1, y2 - 1)).all()


def test_a_box_along_an_angle_is_tight_about_the_pixels():
    mask = np.zeros((40, 60), bool)
    mask[10:20, 15:45] = True
    corners = box_along(mask, 0.0)
    np.testing.assert_allclose((corners.min(0), corners.max(0)), ((15, 10), (45, 20)))
    turned = box_along(mask, math.pi / 2)
    np.testing.assert_allclose((turned.min(0), turned.max(0)), ((15, 10), (45, 20)), atol=1e-9)
