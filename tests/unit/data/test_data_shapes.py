"""The embedded data set."""

import hashlib
import json

import numpy as np
import pytest

from data.images.reading import read_image
from data.labels.files import list_images
from data.labels.yolo import read_labels
from data.tools import embedded, shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shapes.ensure_shapes(tmp_path_factory.mktemp("embedded") / "shapes")


def digest(folder):
    parts = [p.relative_to(folder).as_posix().encode() + p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_data_set_has_the_documented_counts_classes_and_sizes(folder):
    assert len(list_images([folder / "images/train"])) >= 160
    assert len(list_images([folder / "images/val"])) >= 40
    table = read_labels(list_images([folder / "images"]), progress=False)
    assert not table.problems
    counts = np.bincount(table.classes)
    assert len(counts) == len(shapes.NAMES) >= 5
    assert counts.min() > 100
    assert np.diff(table.starts).min() >= 1
    owners = np.repeat(table.shapes_hw, np.diff(table.starts), axis=0)
    sides = table.boxes_cxcywh[:, 2:] * owners[:, ::-1]
    assert sides.min() >= 5
    assert (sides.max(1) < 14).sum() > 20
    assert 130 < sides.max() <= 165
    low, high = table.boxes_cxcywh[:, :2] - table.boxes_cxcywh[:, 2:] / 2, table.boxes_cxcywh[:, :2] + table.boxes_cxcywh[:, 2:] / 2
    assert ((low < 1e-4) | (high > 1 - 1e-4)).any(1).mean() > 0.05  # cut by a border


def test_coco_annotations_agree_with_the_labels(folder):
    for split in ("train", "val"):
        files = list_images([folder / "images" / split])
        table = read_labels(files, progress=False)
        coco = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        assert [i["file_name"] for i in coco["images"]] == [f.rsplit("/")[-1] for f in files]
        assert [(i["height"], i["width"]) for i in coco["images"]] == [tuple(hw) for hw in table.shapes_hw]
        assert [a["category_id"] - 1 for a in coco["annotations"]] == table.classes.tolist()
        boxes = np.concatenate([table.instances(i, hw=tuple(table.shapes_hw[i])).boxes_xyxy for i in range(len(table))])
        expected = np.array([a["bbox"] for a in coco["annotations"]], float)
        np.testing.assert_allclose(boxes[:, :2], expected[:, :2], atol=0.01)
        np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], expected[:, 2:], atol=0.01)


def test_data_set_is_deterministic(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"train": 3, "val": 2})
    first, second = (shapes.ensure_shapes(tmp_path / name) for name in "ab")
    assert digest(first) == digest(second)
    name = "images/train/train_0002.jpg"
    np.testing.assert_array_equal(read_image(first / name), read_image(folder / name))


def test_interrupted_drawing_leaves_no_partial_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"train": 2, "val": 1})
    real = shapes.generate

    def interrupted(folder):
        real(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.ensure_shapes(tmp_path / "shapes")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shapes, "generate", real)
    shapes.ensure_shapes(tmp_path / "shapes")
    monkeypatch.setattr(shapes, "generate", interrupted)
    shapes.ensure_shapes(tmp_path / "shapes")  # not drawn again
    (tmp_path / "shapes" / embedded.VERSION_FILE).write_text("an older version")
    monkeypatch.setattr(shapes, "generate", real)
    shapes.ensure_shapes(tmp_path / "shapes")
    assert (tmp_path / "shapes" / embedded.VERSION_FILE).read_text().strip() == str(shapes.VERSION)
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]
