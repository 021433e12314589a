"""COCO JSON, YOLO label files and VOC XML into each other."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data.dataset_spec import load_dataset_spec
from data.labels.files import list_images
from data.labels.voc import parse_xml
from data.labels.yolo import read_labels
from data.tools import convert
from data.tools.convert import coco_to_yolo, voc_to_yolo, yolo_to_coco
from tests.coco_layout import edit_json, write_coco_layout
from tests.image_files import write_images
from utils.errors import UserError

VOC = """<annotation><folder>x</folder><filename>{name}</filename><size><width>100</width><height>50</height><depth>3</depth></size>
{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""


def voc_object(name, *box, difficult=0):
    return OBJECT.format(*box, name=name, difficult=difficult)


def write_voc(folder, files):
    folder.mkdir(exist_ok=True)
    for stem, objects in files.items():
        (folder / f"{stem}.xml").write_text(VOC.format(name=f"{stem}.jpg", objects="".join(objects)))
    return folder


def table_of(yaml_path, split):
    files = list_images(load_dataset_spec(yaml_path, need=(split,)).sources(split))
    return read_labels(files, progress=False)


@pytest.mark.parametrize("segments", [False, True])
def test_yolo_to_coco_and_back_is_the_same(tmp_path, segments):
    rng = np.random.default_rng(0)
    wh = rng.uniform(0.02, 0.4, (40, 2))
    centres = rng.uniform(wh / 2, 1 - wh / 2)
    rows = [(i % 3, *c, *s) for i, (c, s) in enumerate(zip(centres, wh))]
    rows.append((1, 0.1, 0.1, 0.4, 0.15, 0.3, 0.5))
    data = write_images(tmp_path / "a", {"train": [[rows[0]]], "val": [rows[:20], [], rows[20:]]}, names=("a", "b", "c"), side=97)
    yolo_to_coco(str(data), tmp_path / "instances_val.json")
    assert coco_to_yolo([tmp_path / "instances_val.json"], tmp_path / "b", images=[tmp_path / "a/images/val"], segments=segments) == []
    before, after = table_of(data, "val"), table_of(tmp_path / "b/data.yaml", "val")
    np.testing.assert_array_equal(before.classes, after.classes)
    np.testing.assert_array_equal(before.starts, after.starts)
    np.testing.assert_allclose(after.boxes_cxcywh, before.boxes_cxcywh, rtol=0, atol=1e-6)
    assert len(after.points) == 3 * segments
    if segments:
        np.testing.assert_allclose(after.points, before.points, atol=1e-6)
    assert load_dataset_spec(tmp_path / "b/data.yaml", need=("val",)).names == ("a", "b", "c")


def test_oriented_boxes_are_refused(tmp_path):
    turned = (0, 0.5, -0.1, 0.9, 0.3, 0.5, 0.7, 0.1, 0.3)
    inside, triangle = (0, 0.5, 0.1, 0.9, 0.3, 0.5, 0.7, 0.1, 0.3), (0, 0.1, 0.1, 0.4, 0.15, 0.3, 0.5)
    for name, images, refused in (("a", [[inside, turned]], True), ("b", [[inside]], False), ("c", [[turned], [triangle]], False)):
        data, out = write_images(tmp_path / name, {"train": [[inside]], "val": images}), tmp_path / f"{name}.json"
        if refused:
            with pytest.raises(UserError, match=r"0\.txt:2: a corner outside of the image, as oriented boxes have"):
                yolo_to_coco(str(data), out)
        else:
            assert len(yolo_to_coco(str(data), out)) == len(images) - 1
        assert out.exists() != refused


def test_converted_coco_boxes_match_the_formula(tmp_path):
    write_coco_layout(tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val2017.json"
    coco_to_yolo([path], tmp_path / "out", images=[tmp_path / "coco/val2017"])
    content = json.loads(path.read_text())
    for image in content["images"]:
        boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        text = (tmp_path / f"out/labels/val2017/{image['file_name'][:-4]}.txt").read_text()
        expected = np.array([[(x + w / 2) / 64, (y + h / 2) / 64, w / 64, h / 64] for x, y, w, h in boxes]).reshape(-1, 4)
        np.testing.assert_allclose(np.array([line.split()[1:] for line in text.splitlines()], float).reshape(-1, 4), expected, atol=1e-6)
        assert (tmp_path / "out/images/val2017" / image["file_name"]).stat().st_nlink == 2
    assert len(load_dataset_spec(tmp_path / "out/data.yaml").names) == 80


def test_broken_annotations_are_one_line_each(tmp_path, capsys):
    write_coco_layout(tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val2017.json"

    def spoil(content):
        content["annotations"][0]["bbox"] = None
        content["annotations"][2]["bbox"] = [1, 1, 0, 5]
        content["images"][1].pop("width")  # its size cannot be told without the image

    edit_json(path, spoil)
    flags = ["coco-to-yolo", str(path), "--out", str(tmp_path / "out")]
    assert convert.main(flags) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "left out: 000000000400.jpg: annotation 1 of" in lines[0]
    assert "000000000401.jpg: no such file" in lines[1]
    assert not (tmp_path / "out/labels/val2017/000000000400.txt").exists()
    assert convert.main([*flags, "--images", str(tmp_path / "coco/val2017"), "--exist-ok"]) == 1
    assert "annotation 3 of instances_val2017.json: a box without area" in capsys.readouterr().err


def test_existing_files_are_kept_without_exist_ok(tmp_path, capsys):
    write_coco_layout(tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val2017.json"
    mine = tmp_path / "out/labels/val2017/000000000402.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert convert.main(["coco-to-yolo", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "000000000402.txt: exists already" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [mine]
    data = write_images(tmp_path / "a", {"val": [[(0, 0.5, 0.5, 0.1, 0.1)]]})
    with pytest.raises(UserError, match="exists already"):
        yolo_to_coco(str(data), path)
    yolo_to_coco(str(data), path, exist_ok=True)
    assert len(json.loads(path.read_text())["annotations"]) == 1


def test_path_outside_the_folder_is_refused(tmp_path):
    write_coco_layout(tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val2017.json"
    edit_json(path, lambda c: c["images"][0].update(file_name="../../evil.jpg"))
    with pytest.raises(UserError, match="leads out"):
        coco_to_yolo([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_voc_boxes_are_converted(tmp_path):
    xml = write_voc(tmp_path / "xml", {"a": [voc_object("dog", 10, 5, 30, 25), voc_object("cat", 50, 10, 100, 50)], "b": []})
    assert voc_to_yolo(xml, tmp_path / "out") == []
    assert (tmp_path / "out/labels/train/a.txt").read_text().splitlines() == ["1 0.2 0.3 0.2 0.4", "0 0.75 0.6 0.5 0.8"]
    assert (tmp_path / "out/labels/train/b.txt").read_text() == ""
    voc_to_yolo(xml, tmp_path / "one", one_based=True, names=("dog", "cat"))
    first = (tmp_path / "one/labels/train/a.txt").read_text().splitlines()[0]
    np.testing.assert_allclose([float(v) for v in first.split()], [0, 0.195, 0.29, 0.21, 0.42])


def test_voc_difficult_objects_and_broken_files_are_handled(tmp_path, capsys):
    good = [voc_object("dog", 10, 5, 30, 25), voc_object("dog", 1, 1, 9, 9, difficult=1)]
    xml = write_voc(tmp_path / "xml", {
        "good": good, "out": [voc_object("dog", 10, 5, 300, 25)], "nan": [voc_object("dog", "nan", 5, 30, 25)],
        "text": [voc_object("dog", "ten", 5, 30, 25)], "flat": [voc_object("dog", 10, 5, 10, 25)], "nameless": [voc_object("", 1, 1, 5, 5)],
        "other": [voc_object("cow", 10, 5, 30, 25)], "inf": [voc_object("dog", 10, 5, "inf", 25)],
    })  # fmt: skip
    (xml / "torn.xml").write_text("<annotation><size>")
    (xml / "empty.xml").write_bytes(b"")
    (xml / "unsized.xml").write_text("<annotation></annotation>")
    (xml / "huge.xml").write_text(VOC.format(name="huge.jpg", objects="").replace(">100<", ">1e999<"))
    bomb = '<!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>' + VOC.format(name="bomb.jpg", objects="&b;")
    (xml / "bomb.xml").write_text(bomb)
    (xml / "bomb16.xml").write_text(bomb, encoding="utf-16")
    images = tmp_path / "images"
    images.mkdir()
    (images / "good.png").write_bytes(b"image")
    flags = ["voc-to-yolo", str(xml), "--images", str(images), "--out", str(tmp_path / "out"), "--names", "dog"]
    assert convert.main(flags) == 1
    said = capsys.readouterr()
    assert "1 difficult objects left out" in said.out
    for stem in ("out", "nan", "text", "flat", "nameless", "other", "inf", "torn", "empty", "unsized", "huge", "bomb", "bomb16"):
        assert said.err.count(f"/xml/{stem}.xml") == 1, stem
    assert said.err.count("DOCTYPE") == 2
    assert (tmp_path / "out/images/train/good.png").is_file()
    assert sorted(p.name for p in (tmp_path / "out/labels/train").iterdir()) == ["flat.txt", "good.txt"]
    assert len((tmp_path / "out/labels/train/good.txt").read_text().splitlines()) == 1
    assert convert.main([*flags, "--difficult", "--exist-ok"]) == 1
    assert len((tmp_path / "out/labels/train/good.txt").read_text().splitlines()) == 2


def test_invalid_xml_and_entities_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no \.xml file"):
        voc_to_yolo(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="DOCTYPE"):
        parse_xml(b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>')


def test_output_names_the_next_steps(tmp_path, capsys):
    write_coco_layout(tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val2017.json"
    assert convert.main(["coco-to-yolo", str(path), "--out", str(tmp_path / "labels")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(f"classes in {tmp_path / 'labels/data.yaml'}; 1 crowd regions left out, YOLO labels have none")
    assert said[1] == f"put the images into {tmp_path / 'labels/images/val2017'}, or give their folders with --images"
    data = str(tmp_path / "coco/coco.yaml")
    for out in (tmp_path, tmp_path / "converted"):
        assert convert.main(["yolo-to-coco", data, "--out", str(out)]) == 2
        assert f"--out {out}: is the JSON file to write, such as {out / 'instances_val.json'}" in capsys.readouterr().err
