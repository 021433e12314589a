"""Labels from a COCO JSON, in the layout of the official archives."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from data.dataset_spec import load_dataset_spec
from data.labels.coco import load_coco, read_coco_labels
from data.labels.files import list_images
from data.labels.source import labels_json, split_labels
from data.loader import LoaderOptions, build_loader
from tests.coco_layout import coco_names, edit_json, write_coco_layout
from utils.config import Hyperparameters
from utils.errors import UserError
from utils.metrics.coco_eval import find_image_id, image_ids_by_name


@pytest.fixture
def coco(tmp_path):
    return write_coco_layout(tmp_path / "coco")


def table_of(yaml_path, split="train"):
    spec = load_dataset_spec(yaml_path)
    files = list_images(spec.sources(split))
    return split_labels(spec, split, files, workers=1, progress=False), files


def test_coco_yaml_reads_the_official_layout(coco):
    (table, remarks), files = table_of(coco)
    content = json.loads((coco.parent / "annotations/instances_train2017.json").read_text())
    assert [os.path.basename(f) for f in files] == [i["file_name"] for i in content["images"]]
    assert "instances_train2017.json (no YOLO label files)" in remarks[0]
    assert table.problems == ()
    assert np.diff(table.starts).tolist() == [2] * 5 + [0]  # the crowd region of the first is no object; the last is background
    for i, image in enumerate(content["images"]):
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        found = table.instances(i, hw=(64, 64))
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
        np.testing.assert_allclose(found.boxes_xyxy, np.array(boxes).reshape(-1, 4), atol=1e-4)
        names = {c["id"]: c["name"] for c in content["categories"]}
        assert [coco_names()[int(c)] for c in found.classes] == [names[a["category_id"]] for a in mine]
        assert found.counts.tolist() == [4, 4][: len(mine)]  # the first in two pieces that overlap
    assert 79 in table.classes
    assert (coco.parent / "annotations/instances_train2017.cache.npz").is_file()


def test_label_files_win_unless_the_dataset_file_names_the_json(coco):
    spec = load_dataset_spec(coco)
    files = list_images(spec.sources("train"))
    assert labels_json(spec, "train", files)[0].name == "instances_train2017.json"
    (coco.parent / "train2017/000000000009.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    path, remark = labels_json(spec, "train", files)
    assert path is None
    assert "YOLO label files" in remark
    coco.write_text(coco.read_text() + "\nannotations: {train: annotations/instances_train2017.json}\n")
    path, remark = labels_json(load_dataset_spec(coco), "train", files)
    assert path.name == "instances_train2017.json"
    assert "names" in remark
    coco.write_text(coco.read_text().replace("{train: ann", "{training: ann"))
    with pytest.raises(UserError, match=r"annotations: .*for a split is expected"):
        load_dataset_spec(coco)


def test_the_cache_follows_json_images_and_names(coco, monkeypatch):
    import data.labels.source

    reads = []
    read = data.labels.source.read_coco_labels
    monkeypatch.setattr(data.labels.source, "read_coco_labels", lambda *a, **k: reads.append(1) or read(*a, **k))
    (first, _), _ = table_of(coco)
    (second, _), _ = table_of(coco)
    assert len(reads) == 1
    np.testing.assert_array_equal(first.boxes_cxcywh, second.boxes_cxcywh)
    path = coco.parent / "annotations/instances_train2017.json"
    edit_json(path, lambda c: c["annotations"].pop(0))
    (third, _), _ = table_of(coco)
    assert len(reads) == 2
    assert len(third.classes) == len(first.classes) - 1
    coco.write_text(coco.read_text().replace("0: person", "0: human"))
    table_of(coco)
    assert len(reads) == 3


def test_invalid_annotation_drops_only_its_image(coco):
    path = coco.parent / "annotations/instances_train2017.json"

    def spoil(content):
        a = content["annotations"]
        a[0]["bbox"] = [1, 2, "x", 4]  # image 9
        a[2]["bbox"] = [50, 50, 40, 40]  # image 10
        a[4]["bbox"] = [5, 5, 0, 10]  # image 11: dropped
        a[6]["category_id"] = 999  # image 12
        a.append({"id": 77, "image_id": 123456, "category_id": 1, "bbox": [1, 1, 5, 5]})
        a.append("nonsense")
        content["images"][4]["width"] = 640  # image 13
        content["images"].append({"id": 50, "file_name": "gone.jpg"})

    edit_json(path, spoil)
    (coco.parent / "train2017/extra.jpg").write_bytes((coco.parent / "train2017/000000000009.jpg").read_bytes())
    (table, _), files = table_of(coco)
    text = "\n".join(p.line() for p in table.problems)
    for said in ("1 of its 7 images are not there, first: gone.jpg", "2 annotations belong to no image", "annotation 1 of instances",
                 "four finite numbers", "outside the 64x64 px", "a box without area, dropped", "category is not in the file's list",
                 "64x64 px, but instances_train2017.json says 640x64", "not among the images"):  # fmt: skip
        assert text.count(said) == 1, (said, text)
    used = [os.path.basename(f) for f, hw in zip(files, table.shapes_hw) if hw[0]]
    assert used == ["000000000011.jpg", "000000000014.jpg"]
    assert len(table.classes) == 1


def test_unnamed_categories_are_reported(coco):
    coco.write_text(coco.read_text().split("names:")[0] + "names: [person, toothbrush]\n")
    (table, _), _ = table_of(coco)
    assert set(table.classes) <= {0, 1}
    assert "does not name (airplane" in str(table.problems[0])


def test_single_class_merges_all_classes(coco):
    spec = load_dataset_spec(coco, single_cls=True)
    files = list_images(spec.sources("train"))
    table, _ = split_labels(spec, "train", files, workers=1, progress=False)
    assert len(table.classes) == 10
    assert set(table.classes) == {0}


@pytest.mark.parametrize("text", ["", "[]", "{\"images\": []}", "{", '{"images": [3], "annotations": [], "categories": []}'])
def test_invalid_coco_json_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "instances_train.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"instances_train\.json"):
        load_coco(path)
    with pytest.raises(UserError, match=r"nowhere\.json"):
        read_coco_labels(tmp_path / "nowhere.json", [], None, progress=False)


def test_images_of_one_name_are_distinguished_by_folder():
    ids = image_ids_by_name({1: "a/1.jpg", 2: "b/1.jpg", 3: "a/2.jpg"})
    assert [find_image_id(ids, p) for p in ("/x/a/1.jpg", "/x/b/1.jpg", "/y/2.jpg", "/x/c/1.jpg")] == [1, 2, 3, None]


def test_loader_gives_the_boxes_of_the_json(coco):
    loader = build_loader(
        load_dataset_spec(coco), "val", LoaderOptions(imgsz=64, batch_size=4, hyp=Hyperparameters(), augment=False, workers=0)
    )  # fmt: skip
    (batch,) = loader
    content = json.loads((coco.parent / "annotations/instances_val2017.json").read_text())
    boxes = np.array([a["bbox"] for a in content["annotations"] if not a["iscrowd"]])
    np.testing.assert_allclose(batch.targets.rows()[:, 4:].numpy() * 64, boxes[:, 2:], atol=1e-3)
