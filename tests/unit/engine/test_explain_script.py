"""explain.py: errors are found as val.py finds them, another network is compared where it can be, and no flag is passed over."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import detect
import explain as script
from data.dataset_spec import load_dataset_spec
from engine.evaluation.evaluate import VALIDATION
from engine.explain import explain
from engine.explain.comparing import compare_figure
from engine.explain.error_panels import error_section, panels_figure, suppression_of
from engine.explain.run import Report, open_network
from engine.explain.tide import Case, ImageResult
from models import build_model
from models.checkpoints.checkpoint import Checkpoint, save_checkpoint
from tests.golden import fill_
from tests.image_files import write_images
from tests.tiny import tiny_cfg, tiny_checkpoint, tiny_model
from utils.cli.explain_arguments import ExplainConfig
from utils.distributed import select_device
from utils.errors import UserError

NAMES, OTHER_ORDER = ("red", "blue", "green"), ("green", "red", "blue")


@pytest.fixture(autouse=True)
def small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.explain.writing.DPI", 20)


def checkpoint_of(path: Path, cfg: dict[str, Any]) -> Path:
    weights = fill_(build_model(cfg, names=NAMES), 1.35).state_dict()
    save_checkpoint(path, Checkpoint(cfg=cfg, cfg_name=path.with_suffix(".yaml").name, names=NAMES, weights=weights, config={}))
    return path


def grey_checkpoint(path: Path) -> Path:
    return checkpoint_of(path, {**tiny_cfg(), "ch": 1})


def longer_checkpoint(path: Path) -> Path:
    """With a row 8 before its head."""
    cfg = tiny_cfg()
    return checkpoint_of(path, {**cfg, "backbone": [*cfg["backbone"], [-1, 1, "Conv", [32, 3]]]})


def explained(weights: Path, source: Path | str, **flags: Any) -> tuple[Report, set[str]]:
    """What was done, and the files that were written."""
    settings = {"imgsz": (64, 64), "conf_thres": 0.02, "device": "cpu", "project": str(weights.parent / "runs")}
    report = script.explain(ExplainConfig(weights=str(weights), source=str(source), **{**settings, **flags}))
    return report, {path.name for path in report.folder.iterdir()}


def costs(weights: Path, data: Path, folder: Path, **flags: Any) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and lines."""
    config = ExplainConfig(weights=str(weights), imgsz=(64, 64), errors=True, device="cpu", panels=1, conf_thres=0.1, **flags)
    model = open_network(weights, select_device("cpu"), config)
    folder.mkdir(exist_ok=True)
    section, _ = error_section(model, config, folder, data=str(data), weights=str(weights))
    return [list(row) for row in section.table], section.lines


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images labelled with the best detections of a network, in two data sets with its names in two orders."""
    root = tmp_path_factory.mktemp("errors")
    tiny_checkpoint(root / "a.pt", NAMES)
    write_images(root / "same", {"val": [[], []]}, names=NAMES)
    flags = ["--img", "64", "--conf", "0.1", "--max-det", "9", "--save-txt", "--nosave", "--project", str(root), "--name", "found"]
    assert detect.main(["--weights", str(root / "a.pt"), "--source", str(root / "same/images/val"), *flags]) == 0
    write_images(root / "other", {"val": [[], []]}, names=OTHER_ORDER)
    for path in (root / "found/labels").glob("*.txt"):
        rows = [row.split(" ", 1) for row in path.read_text().splitlines()]
        (root / "same/labels/val" / path.name).write_text("".join(f"{label} {rest}\n" for label, rest in rows))
        text = "".join(f"{OTHER_ORDER.index(NAMES[int(label)])} {rest}\n" for label, rest in rows)
        (root / "other/labels/val" / path.name).write_text(text)
    return root


def test_classes_in_another_order_are_matched_by_name(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, lines = costs(labelled / "a.pt", labelled / "same/data.yaml", tmp_path / "same")
    other_table, other_lines = costs(labelled / "a.pt", labelled / "other/data.yaml", tmp_path / "other")
    assert "in another order; they are matched by name" in capsys.readouterr().out
    assert other_table == table
    assert other_lines[0] == lines[0]
    assert sorted(other_lines) == sorted(lines)
    assert int(table[-1][2]) > 0


def test_grey_network_reads_a_data_set_that_says_nothing_of_channels(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", {"val": [[(0, 0.5, 0.5, 0.3, 0.3)]]}, names=NAMES)
    weights = grey_checkpoint(tmp_path / "grey.pt")
    table, _ = costs(weights, data, tmp_path / "figures")
    assert len(table) == 8
    data.write_text(data.read_text() + "ch: 3\n")
    with pytest.raises(UserError, match=r"ch: 3, but .*grey\.pt takes 1 channels"):
        costs(weights, data, tmp_path / "figures")


def test_errors_follow_the_flags_of_suppression() -> None:
    assert suppression_of(ExplainConfig(errors=True)) == VALIDATION
    found = suppression_of(ExplainConfig(errors=True, iou_thres=0.3, max_det=7))
    assert (found.conf, found.iou, found.max_det) == (VALIDATION.conf, 0.3, 7)


@pytest.mark.parametrize("flags", [{"receptive_field": True, "no_cam": True}, {"faithfulness": True}])
def test_flags_about_images_are_followed_beside_errors(tmp_path: Path, flags: dict[str, Any]) -> None:
    data = write_images(tmp_path / "data", {"val": [[(0, 0.5, 0.5, 0.3, 0.3)]]}, names=NAMES)
    weights = tiny_checkpoint(tmp_path / "a.pt", NAMES)
    report, files = explained(weights, "", errors=True, data=str(data), panels=1, no_modules=True, **flags)
    assert (report.images, report.compared) == (1, 1)
    assert any(name.startswith("errors_") for name in files)
    assert ("receptive_fields.png" in files) is ("receptive_field" in flags)
    assert ("deletion" in (report.folder / "index.html").read_text(encoding="utf-8")) is ("faithfulness" in flags)


def test_errors_alone_explain_no_image() -> None:
    assert not ExplainConfig(errors=True, no_cam=True, no_modules=True).explains_images
    assert ExplainConfig(errors=True, compare="other.pt").explains_images
    assert ExplainConfig(errors=True, target=(0,)).explains_images


def test_fonts_are_chosen_for_all_that_a_figure_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of image files and of weights, too, which are in no list of classes."""
    asked: list[str] = []

    def families_for(texts: Iterable[str]) -> list[str]:
        asked.extend(texts)
        return ["DejaVu Sans", "one with those characters"]

    monkeypatch.setattr("engine.explain.figures.families_for", families_for)
    image = np.zeros((64, 64, 3), np.uint8)
    (tmp_path / "图像.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    one_box = ImageResult(
        str(tmp_path / "图像.png"), *(np.array(v) for v in ([[8.0, 8, 40, 40]], [0.9], [0])), np.zeros((0, 4)), np.zeros(0)
    )
    spec = load_dataset_spec(write_images(tmp_path / "data", {"val": [[]]}, names=NAMES), need=("val",))
    panels = panels_figure([Case(0, "background", 0, -1, 0.9, 0.0)], [one_box], spec, "title", 3)
    assert any("图像.png" in text for text in asked)
    found = explain(tiny_model(NAMES), image, hw=(64, 64), modules=False)
    compared = compare_figure((found, found), ("基线.pt", "b.pt"), "layercam")
    assert any("基线.pt" in text for text in asked)
    for figure in (panels, compared):
        assert all(axes.title.get_fontfamily()[1] == "one with those characters" for axes in figure.axes if axes.get_title())


def test_long_name_in_another_script_leaves_room_for_what_is_added(tmp_path: Path) -> None:
    own, images = tiny_checkpoint(tmp_path / "a.pt", NAMES), write_images(tmp_path / "data", {"val": [[]]}).parent / "images/val"
    (images / "0.png").rename(images / f"{'图' * 80}.png")  # 244 bytes, of 255 that are possible
    report, files = explained(own, images, method=("gradcam++",), rows=(3,))
    assert report.images == 1
    assert f"0000_{'图' * 33}_gradcam++_row3.npy" in files
    assert f"0000_{'图' * 33}_row07_FocalModulation.png" in files


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two images."""
    write_images(tmp_path / "data", {"val": [[], []]}, names=NAMES)
    return tmp_path / "data/images/val"


def test_network_without_the_modules_is_compared(tmp_path: Path, images: Path) -> None:
    with_attention, plain = tiny_checkpoint(tmp_path / "a.pt", NAMES), tiny_checkpoint(tmp_path / "b.pt", NAMES, attention=("Conv", [32]))
    report, files = explained(with_attention, images / "0.png", compare=str(plain), modules=(7,))
    assert report.images == 1
    assert {"0000_0_compared_layercam.png", "0000_0_row07_FocalModulation.png"} <= files


def test_image_with_a_class_that_the_other_lacks_is_a_line(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, other = tiny_checkpoint(tmp_path / "a.pt", NAMES), tiny_checkpoint(tmp_path / "b.pt", ("red", "x", "y"))
    report, files = explained(own, images, compare=str(other), no_modules=True)
    assert report.images == 2
    assert {"0000_0_layercam.png", "0001_1_layercam.png"} <= files
    assert not any("compared" in name for name in files)
    lines = [line for line in (capsys.readouterr().out).splitlines() if "b.pt: not compared: the other network has no class" in line]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("make", "flags", "says"),
    [
        (lambda path: tiny_checkpoint(path, NAMES), {"rows": (8,)}, r"--compare .*b\.pt: --rows: row 8: "),
        (grey_checkpoint, {}, r"--compare .*b\.pt: takes images of 1 channels, but .*a\.pt of 3"),
        (lambda path: tiny_checkpoint(path, ("x", "y", "z")), {}, r"--compare .*b\.pt: knows none of the classes"),
        (lambda path: path.with_suffix(".onnx"), {}, r"--compare .*b\.onnx: an exported file"),
    ],
)
def test_network_that_cannot_be_compared_is_refused_at_once(tmp_path: Path, images: Path, make: Any, flags: Any, says: str) -> None:
    own, other = longer_checkpoint(tmp_path / "a.pt"), make(tmp_path / "b.pt")
    with pytest.raises(UserError, match=says):
        explained(own, images, compare=str(other), **flags)
    assert not (tmp_path / "runs").exists()
