"""Which files conversions write: each annotation file its own, images found whatever the annotations call them, and nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.dataset_spec import load_dataset_spec
from data.labels.files import list_images
from data.labels.source import split_labels
from data.tools.convert import coco_to_yolo, main, voc_to_yolo
from utils.errors import UserError
from utils.metrics.coco_file import find_image_id, image_ids_by_name

VOC = """<annotation><filename>{name}</filename><size><width>40</width><height>20</height></size><object><name>{label}</name>
<bndbox><xmin>0</xmin><ymin>0</ymin><xmax>{x}</xmax><ymax>10</ymax></bndbox></object></annotation>"""


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 40, 3), value, np.uint8)).save(path)


def write_voc(root, files, *, images=()):
    """XML files by path without suffix, each with the name that it gives and a box as wide as its number says; and images."""
    for number, (path, given) in enumerate(files.items(), start=1):
        xml = root / f"xml/{path}.xml"
        xml.parent.mkdir(parents=True, exist_ok=True)
        xml.write_text(VOC.format(name=given, label="thing", x=4 * number))
    for number, path in enumerate(images):
        write_image(root / "jpg" / path, number)
    return root / "xml", root / "jpg"


def tree(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


CASES = {
    "renamed": ({"000": "old_0.jpg", "001": "old_1.jpg"}, ["000.jpg", "001.jpg"]),
    "equal": ({"000": "image.jpg", "001": "image.jpg"}, ["000.jpg", "001.jpg"]),
    "dots": ({"clip.mp4_0": "clip.mp4_0", "clip.mp4_1": "clip.mp4_1"}, ["clip.mp4_0.jpg", "clip.mp4_1.jpg"]),
    "dates": ({"2021-01-26_18.14.01": "2021-01-26_18.14.01", "2021-01-26_18.15": ""}, ["2021-01-26_18.14.01.png", "2021-01-26_18.15.png"]),
    "no suffix": ({"000": "000", "001": "001"}, ["000.jpg", "001.jpg"]),
    "other suffix": ({"000": "000.png", "001": "001.png"}, ["000.jpg", "001.jpg"]),
    "folders": ({"a/001": "001.jpg", "b/001": "001.jpg"}, ["a/001.jpg", "b/001.jpg"]),
    "image folders alone": ({"x": "x.jpg", "y": "y.jpg"}, ["a/x.jpg", "b/y.jpg"]),
    "given name alone": ({"ann0": "a.jpg", "ann1": "b.jpg"}, ["a.jpg", "b.jpg"]),
    "capitals": ({"A": "A.JPG", "B": "B.JPG"}, ["A.JPG", "B.JPG"]),
    "folder in the name": ({"0": "old\\0.jpg", "1": "/data/1.jpg"}, ["0.jpg", "1.jpg"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_xml_becomes_one_label_file_with_its_image(tmp_path, case, capsys):
    files, images = CASES[case]
    xml, jpg = write_voc(tmp_path, files, images=images)
    assert voc_to_yolo(xml, tmp_path / "out", images=jpg) == []
    assert capsys.readouterr().out.startswith("2 label files, 2 images, 2 objects of 1 classes")
    spec = load_dataset_spec(tmp_path / "out/data.yaml", need=("train",))
    found = list_images(spec.sources("train"))
    table, remarks = split_labels(spec, "train", found, progress=False)
    np.testing.assert_allclose(table.boxes_cxcywh[:, 2], [0.1, 0.2], atol=1e-6)  # none is another's
    assert remarks == []
    assert [Path(f).read_bytes() for f in found] == [(jpg / i).read_bytes() for i in images]
    assert [Path(f).with_suffix("").name for f in found] == [Path(f).name for f in files]


def test_labels_alone_are_named_after_the_xml_and_a_line_says_how_many_name_another_image(tmp_path, capsys):
    xml, _ = write_voc(tmp_path, {"a/0": "0.jpg", "b/0": "7.jpg", "1.5": "1.5"})
    assert voc_to_yolo(xml, tmp_path / "out") == []
    assert tree(tmp_path / "out/labels/train") == ["1.5.txt", "a/0.txt", "b/0.txt"]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("3 label files, 3 objects")
    assert said[1].startswith(f"1 of 3 XML files name another image than their own name says, first: {xml / 'b/0.xml'} names 7.jpg")


def test_two_xml_of_one_image_are_an_error_and_nothing_is_written(tmp_path):
    xml, jpg = write_voc(tmp_path, {"a": "image.jpg", "b": "image.jpg"}, images=["image.jpg"])
    with pytest.raises(UserError, match=r"the image .*image.jpg would be that of both .*a\.xml and .*b\.xml"):
        voc_to_yolo(xml, tmp_path / "out", images=jpg)
    (xml / "b.xml").rename(xml / "a.XML")
    with pytest.raises(UserError, match=r"the label file .*train/a\.txt would be that of both"):
        voc_to_yolo(xml, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ambiguous_and_missing_images_are_named_and_not_counted(tmp_path, capsys):
    xml, jpg = write_voc(tmp_path, {"x": "x.jpg", "y": "y.jpg", "z": "z.jpg"}, images=["a/x.jpg", "b/x.jpg", "z.jpg"])
    assert main(["voc-to-yolo", str(xml), "--images", str(jpg), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("3 label files, 1 images, 3 objects")
    assert said.err.splitlines() == [f"{jpg / name}: no such file" for name in ("x.jpg", "y.jpg")]


def write_coco(root, names, *, images=()):
    """A JSON with an image of each name, whose box is as wide as its number says; and images."""
    entries = [{"id": i, "file_name": n, "width": 40, "height": 20} for i, n in enumerate(names, start=1)]
    boxes = [{"id": i, "image_id": i, "category_id": 0, "bbox": [0, 0, 4 * i, 10]} for i in range(1, len(names) + 1)]
    path = root / "train.json"
    root.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": entries, "annotations": boxes, "categories": [{"id": 0, "name": "thing"}]}))
    for number, name in enumerate(images):
        write_image(root / "images" / name, number)
    (root / "data.yaml").write_text("train: images\nval: images\nnames: [thing]\nannotations: {train: train.json, val: train.json}\n")
    return path


@pytest.mark.parametrize(
    "form", ["{}", "images/{}", "images\\{}", "..\\..\\media\\upload\\4\\{}", "./{}", "C:\\pool\\{}", "/home/me/images/{}"]
)
def test_coco_names_with_folders_are_joined_as_the_checker_joins_them(tmp_path, form):
    images = ["a.png", "b.png"]
    path = write_coco(tmp_path / "set", [form.format(i) for i in images], images=images)
    spec = load_dataset_spec(tmp_path / "set/data.yaml")
    read, _ = split_labels(spec, "train", list_images(spec.sources("train")), progress=False)
    assert coco_to_yolo([path], tmp_path / "out", images=[tmp_path / "set/images"]) == []
    assert tree(tmp_path / "out") == ["data.yaml", *(f"{k}/train/{n}" for k in ("images", "labels") for n in
                                                   (images if k == "images" else ["a.txt", "b.txt"]))]  # fmt: skip
    converted = load_dataset_spec(tmp_path / "out/data.yaml", need=("train",))
    table, _ = split_labels(converted, "train", list_images(converted.sources("train")), progress=False)
    np.testing.assert_allclose(table.boxes_cxcywh, read.boxes_cxcywh, atol=1e-6)
    np.testing.assert_allclose(table.boxes_cxcywh[:, 2], [0.1, 0.2], atol=1e-6)


@pytest.mark.parametrize(
    "names", [["a.jpg", "a.png"], ["a.jpg", "a.jpg"], ["a.jpg", "./a.jpg"], ["x/a.jpg", "x\\a.jpg"], ["a.jpg", "images/a.jpg"]]
)
def test_two_images_of_one_label_file_are_an_error(tmp_path, names):
    path = write_coco(tmp_path / "set", names)
    with pytest.raises(UserError, match=r"would be that of both image 1 .* and image 2"):
        coco_to_yolo([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_json_of_one_split_name_with_one_image_name_are_an_error(tmp_path):
    paths = [write_coco(tmp_path / name, ["a.jpg"]) for name in ("one", "two")]
    with pytest.raises(UserError, match=r"one/train\.json and image 1 \(a\.jpg\) of .*two/train\.json"):
        coco_to_yolo(paths, tmp_path / "out")


def test_coco_counts_are_of_what_was_written(tmp_path, capsys):
    path = write_coco(tmp_path / "set", ["a.png", "gone.png", "bad.png", "../out.png"], images=["a.png", "bad.png"])
    content = json.loads(path.read_text())
    content["annotations"][2]["bbox"] = None
    path.write_text(json.dumps(content))
    problems = coco_to_yolo([path], tmp_path / "out", images=[tmp_path / "set/images"])
    assert [p.message.split(":")[0] for p in problems] == ["no such file", "annotation 3 of train.json", "no such file"]
    assert capsys.readouterr().out.startswith("2 label files, 1 images, 2 objects of 1 classes")
    assert tree(tmp_path / "out/labels") == ["train/a.txt", "train/gone.txt"]


def test_image_in_a_folder_is_not_taken_for_one_of_its_name_above_it():
    ids = image_ids_by_name({1: "1.jpg", 2: "a/1.jpg", 3: "b\\2.jpg"})
    assert [find_image_id(ids, p) for p in ("/x/1.jpg", "/x/a/1.jpg", "/x/b/2.jpg", "/x/2.jpg")] == [1, 2, 3, 3]


def test_labels_of_names_with_an_images_folder_inside_are_where_the_reader_looks(tmp_path):
    path = write_coco(tmp_path / "set", ["one/images/a.png", "two/images/a.png"], images=["one/images/a.png", "two/images/a.png"])
    assert coco_to_yolo([path], tmp_path / "out", images=[tmp_path / "set/images"]) == []
    spec = load_dataset_spec(tmp_path / "out/data.yaml", need=("train",))
    assert len(split_labels(spec, "train", list_images(spec.sources("train")), progress=False)[0].classes) == 2
