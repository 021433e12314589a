"""Outlines and keypoints through the converters: what COCO's JSON says of them, and what comes back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data.dataset_spec import load_dataset_spec
from data.labels.coco import load_coco
from data.labels.files import list_images
from data.labels.source import split_labels
from data.labels.table import build_table
from data.tools import convert
from tasks import POSE, SEGMENT
from tests.image_files import write_images
from utils.masks.outlines import joined
from utils.masks.rasterise import polygon_masks

SIDE = 100


def square(x: float, y: float, size: float) -> np.ndarray:
    return np.array(((x, y), (x + size, y), (x + size, y + size), (x, y + size)))


def row(*rings: np.ndarray) -> list[float]:
    """A label row of class 0 with rings in px, joined by bridges."""
    return [0, *(joined(rings) / SIDE).ravel().tolist()]


def table_of(data, task):
    spec = load_dataset_spec(data, need=("val",))
    task = task.for_labels(spec.label_settings, source="x")
    return split_labels(spec, "val", list_images(spec.sources("val")), task=task, progress=False)[0]


def masks_of(labels) -> np.ndarray:
    return polygon_masks(labels.instances(0, hw=(SIDE, SIDE)).outlines(), (SIDE, SIDE))


def test_outlines_in_pieces_and_with_holes_keep_their_pixels_and_their_area(tmp_path):
    shapes = [(square(10, 60, 20), square(70, 60, 10)), (square(10, 10, 40), square(20, 20, 20)), (square(60, 10, 30),)]
    data = write_images(tmp_path / "a", {"train": [], "val": [[row(*rings) for rings in shapes]]}, names=("a",), side=SIDE)
    path = tmp_path / "instances_val.json"
    assert convert.main(["yolo-to-coco", str(data), "--out", str(path)]) == 0
    pieces, hole, whole = json.loads(path.read_text())["annotations"]
    assert [len(piece) for piece in pieces["segmentation"]] == [8, 8]
    assert hole["segmentation"]["size"] == [SIDE, SIDE]
    assert [a["area"] for a in (pieces, hole, whole)] == pytest.approx([500, 1200, 900], rel=0.05)
    assert pieces["bbox"][2:] == pytest.approx([70, 20], abs=1e-3)
    read = load_coco(path, ("a",))
    before, after = masks_of(table_of(data, SEGMENT)), masks_of(build_table([read.labels_of(min(read.files), (SIDE, SIDE), "x")]))
    for own, other in zip(before, after):
        assert (own != other).sum() <= 0.12 * own.sum()  # a border of one pixel at most
    assert not after[0][:, 40:65].any(), "the line of a bridge"


def test_pose_labels_to_coco_and_back_are_the_same(tmp_path, capsys):
    rows = [(0, 0.5, 0.5, 0.4, 0.6, 0.4, 0.5, 2, 0.6, 0.5, 1), (1, 0.3, 0.3, 0.2, 0.2), (0, 0.4, 0.5, 0.4, 0.6, 0, 0, 0, 0.5, 0.5, 2)]
    data = write_images(tmp_path / "a", {"train": [], "val": [rows]}, names=("a", "b"), side=SIDE)
    data.write_text(f"{data.read_text()}kpt_shape: [2, 3]\nskeleton: [[0, 1]]\n")
    path = tmp_path / "instances_val.json"
    assert convert.main(["yolo-to-coco", str(data), "--out", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["categories"][0]["skeleton"] == [[1, 2]]
    assert len(content["categories"][0]["keypoints"]) == 2
    assert [a["num_keypoints"] for a in content["annotations"]] == [2, 0, 1]
    assert content["annotations"][0]["keypoints"] == pytest.approx([40, 50, 2, 60, 50, 1], abs=1e-4)
    assert content["annotations"][0]["area"] == pytest.approx(0.53 * 40 * 60)
    back = ["coco-to-yolo", str(path), "--images", str(tmp_path / "a/images/val"), "--out"]
    assert convert.main([*back, str(tmp_path / "b")]) == 0
    assert "kpt_shape: [2, 3]; add flip_idx" in capsys.readouterr().out
    spec = load_dataset_spec(tmp_path / "b/data.yaml", need=("val",))
    assert spec.keypoints is not None
    assert (spec.kpt_shape, spec.keypoints.skeleton) == ((2, 3), ((0, 1),))
    before, after = table_of(data, POSE), table_of(tmp_path / "b/data.yaml", POSE)
    np.testing.assert_allclose(after.keypoints, before.keypoints, atol=1e-6)
    np.testing.assert_allclose(after.boxes_cxcywh, before.boxes_cxcywh, atol=1e-6)
    assert convert.main([*back, str(tmp_path / "c"), "--segments"]) == 0
    assert "keypoints left out" in capsys.readouterr().out
