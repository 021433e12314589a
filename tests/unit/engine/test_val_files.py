"""The files of val.py and detect.py where images share their names, and names that mean something to other programs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import detect
import val
from data.tools.yolo_to_coco import yolo_to_coco
from tasks import DETECT
from tests.tiny import tiny_checkpoint
from utils.cli.val_arguments import ValConfig
from utils.errors import UserError
from utils.metrics.coco_eval import CocoAnnotations, read_instances, run_pycocotools
from utils.metrics.coco_file import number_images
from utils.text_table import csv_cell
from utils.types import Detections
from utils.visual.savers import ResultWriter, SaveOptions, as_file_name, unique_stems

NAMES = ("red", "blue")
IMAGES = ("s1/000000.png", "s1/000001.png", "s2/000000.png", "s2/000001.png", "s2/a.png", "s2/a.jpg", "b.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of equal names in two folders and with two suffixes."""
    root = tmp_path_factory.mktemp("names")
    rng = np.random.default_rng(0)
    for name in IMAGES:
        image, label = root / "images" / name, (root / "labels" / name).with_suffix(".txt")
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(image), rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        label.write_text("0 0.5 0.5 0.25 0.25\n1 0.3 0.3 0.2 0.2\n")
    (root / "data.yaml").write_text("path: .\nval: images\nnames: [red, blue]\n")
    tiny_checkpoint(root / "a.pt", NAMES)
    return root


def validate(folder: Path, name: str, data: str = "data.yaml") -> Path:
    val.validate(
        ValConfig(
            weights=str(folder / "a.pt"), data=str(folder / data), imgsz=64, batch_size=4, workers=0, device="cpu", conf_thres=0.3,
            project=str(folder / "runs"), name=name, save_json=True, save_txt=True,
        )
    )  # fmt: skip
    return folder / "runs" / name


def test_image_ids_are_those_of_the_converted_data_set(folder: Path) -> None:
    out = validate(folder, "ids")
    converted = folder / "instances_val.json"
    yolo_to_coco(str(folder / "data.yaml"), converted)
    rows = json.loads((out / "a_predictions.json").read_text())
    files = {image["id"]: image["file_name"] for image in json.loads(converted.read_text())["images"]}
    assert sorted(files.values()) == sorted(IMAGES)
    assert {row["image_id"] for row in rows} == set(files)
    assert all(isinstance(row["image_id"], int) for row in rows)
    run_pycocotools(converted, rows)
    assert {p.relative_to(out / "labels").as_posix() for p in (out / "labels").rglob("*.txt")} == {
        "s1/000000.txt", "s1/000001.txt", "s2/000000.txt", "s2/000001.txt", "s2/a.png.txt", "s2/a.jpg.txt", "b.txt",
    }  # fmt: skip
    for image_id, name in files.items():
        label = out / "labels" / (f"{name}.txt" if "/a." in name else str(Path(name).with_suffix(".txt")))
        assert len(label.read_text().splitlines()) == sum(row["image_id"] == image_id for row in rows)


def test_image_ids() -> None:
    assert number_images(["a/000000000139.jpg", "٣.jpg"]) == [139, 3]
    assert number_images(["s1/0.jpg", "s2/0.jpg"]) == [1, 2]
    assert number_images(["BloodImage_00000.jpg", "7.jpg"]) == [1, 2]
    assert number_images([]) == []


def test_two_files_that_are_one_image_of_a_coco_file_are_refused(folder: Path, tmp_path: Path) -> None:
    content = {
        "images": [{"id": 4, "file_name": "a.png"}, {"id": 5, "file_name": "s1/b.png"}, {"id": 6, "file_name": "s2/b.png"}],
        "annotations": [], "categories": [{"id": 1, "name": "red"}],
    }  # fmt: skip
    (tmp_path / "instances.json").write_text(json.dumps(content))
    annotations: CocoAnnotations = read_instances(tmp_path / "instances.json", ["red"])
    annotations.check_unique(["x/s1/b.png", "x/s2/b.png", "x/s1/a.png"])
    with pytest.raises(UserError, match=r"image 4 is both x/s1/a\.png and x/s2/a\.png"):
        annotations.check_unique(["x/s1/a.png", "x/s2/a.png"])


def test_detect_names_what_it_renames(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--conf", "0.3", "--save-txt", "--save-csv", "--img", "64", "--project", str(folder / "d"), "--name", "x"]
    assert detect.main(["--weights", str(folder / "a.pt"), "--source", str(folder / "images/**/*.*g"), *flags]) == 0
    text = capsys.readouterr().out
    assert "3 sources share their name with another; their results have a number, first: 000000_2 is " in text
    assert {p.stem for p in (folder / "d/x/labels").iterdir()} == {"000000", "000000_2", "000001", "000001_2", "a", "a_2", "b"}
    with open(folder / "d/x/predictions.csv", newline="", encoding="utf-8") as file:
        assert {row["Image Name"] for row in csv.DictReader(file)} == {p.name for p in (folder / "d/x").glob("*.*g")}


def test_stems_tell_images_of_one_name_apart() -> None:
    stem = {"/d/a/1.png": "1", "/d/b/2.png": "b/2", "/d/c/2.png": "c/2", "/d/c/3.png": "c/3.png", "/d/c/3.jpg": "c/3.jpg"}
    assert unique_stems(list(stem)) == stem
    assert unique_stems(["/d/A.png", "/d/a.png"]) == {"/d/A.png": "A.png", "/d/a.png": "a.png_2"}
    assert unique_stems([]) == {}


BOX = Detections(torch.tensor([[1.0, 1.0, 9.0, 9.0]]), torch.tensor([0.5]), torch.tensor([0]))
BLANK = np.zeros((16, 16, 3), np.uint8)


def test_a_video_frame_does_not_overwrite_the_labels_of_an_image(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, NAMES, SaveOptions(images=False, txt=True), DETECT)
    with writer:
        writer.write("clip_2.png", BLANK, BOX, drawn=BLANK)
        for frame in (1, 2, 3):
            writer.write("clip.mp4", BLANK, BOX, drawn=BLANK, frame=frame)
    assert {p.stem for p in (tmp_path / "labels").iterdir()} == {"clip_1", "clip_2", "clip_2_2", "clip_3"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CON", "_CON"), ("nul.txt", "_nul.txt"), ("Com1", "_Com1"), ("console", "console"), ("..", "_"), ("", "_"), ("a. .", "a"),
        ("../../x", "_.._x"), ("a/b\\c:d", "a_b_c_d"), ("x\ud800\x1b[31m", "x__[31m"), ("é" * 300, "é" * 100), ("person", "person"),
    ],
)  # fmt: skip
def test_names_as_files(name: str, expected: str, tmp_path: Path) -> None:
    assert as_file_name(name) == expected
    (tmp_path / as_file_name(name)).mkdir()


def test_crops_have_a_folder_for_each_class(tmp_path: Path) -> None:
    names = ("..", "a/b", "a_b", "Dog", "dog", "CON")
    found = Detections(BOX.boxes.repeat(6, 1), torch.ones(6), torch.arange(6))
    with ResultWriter(tmp_path / "run", names, SaveOptions(images=False, crops=True), DETECT) as writer:
        writer.write("x.png", BLANK, found, drawn=BLANK)
    folders = {p.parent.name for p in (tmp_path / "run/crops").rglob("*.jpg")}
    assert folders == {"_", "a_b", "a_b_2", "Dog", "dog_2", "_CON"}
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("text", ["=1+1", "+SUM(A1)", "-cmd|'calc'!A0", "@x", "\t=1", "\r=1", "\n=1"])
def test_no_cell_of_a_csv_file_begins_a_formula(text: str, tmp_path: Path) -> None:
    assert csv_cell(text) == f"'{text}"
    with ResultWriter(tmp_path, (text,), SaveOptions(images=False, csv=True), DETECT) as writer:
        writer.write(f"{text.strip()}.png", BLANK, BOX, drawn=BLANK)
    with open(tmp_path / "predictions.csv", newline="", encoding="utf-8") as file:
        _, row = csv.reader(file)
    assert row[1] == f"'{text}"
    assert row[0].startswith("'")


@pytest.mark.parametrize("value", ["person", "-1", "+2.5e3", "-inf", "", 3, None, -0.5, "a=b"])
def test_other_cells_stay_as_they_are(value: object) -> None:
    assert csv_cell(value) == value
