"""Predictions are compared with a data set by class name: in val.py, and of several files of weights."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import detect
import val
from engine.inference.class_order import class_order, in_order_of
from engine.inference.ensemble import Ensemble
from engine.inference.predictor import fixed_size
from tests.tiny import tiny_checkpoint, tiny_model
from utils.cli.val_arguments import ValConfig

NAMES, OTHER_ORDER = ("red", "blue", "green"), ("green", "red", "blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images labelled with the best detections of a network, by its class numbers; data sets with its names and others."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    tiny_checkpoint(root / "a.pt", NAMES)
    for i in range(3):
        cv2.imwrite(str(root / f"images/{i}.png"), rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    flags = ["--img", "64", "--conf", "0.1", "--max-det", "9", "--save-txt", "--nosave"]
    flags += ["--project", str(root.parent), "--name", root.name, "--exist-ok"]
    assert detect.main(["--weights", str(root / "a.pt"), "--source", str(root / "images"), *flags]) == 0
    for name, names in (("same", NAMES), ("case", ("Red", "blue ", "GREEN")), ("others", ("apple", "pear", "fig"))):
        (root / f"{name}.yaml").write_text(f"path: .\nval: images\nnames: {json.dumps(list(names))}\n")
    (root / "numbers.yaml").write_text("path: .\nval: images\nnc: 3\n")
    (root / "order.yaml").write_text(f"path: reordered\nval: images\nnames: {json.dumps(list(OTHER_ORDER))}\n")
    (root / "reordered" / "labels").mkdir(parents=True)
    (root / "reordered" / "images").mkdir()
    for path in (root / "images").iterdir():
        (root / "reordered" / "images" / path.name).write_bytes(path.read_bytes())
        rows = [row.split(" ", 1) for row in (root / f"labels/{path.stem}.txt").read_text().splitlines()]
        text = "\n".join(f"{OTHER_ORDER.index(NAMES[int(label)])} {rest}" for label, rest in rows)
        (root / f"reordered/labels/{path.stem}.txt").write_text(text)
    return root


def validate(folder: Path, data: str, weights: str = "a.pt", **flags: object) -> val.MetricResult:
    config = ValConfig(
        weights=str(folder / weights), data=str(folder / f"{data}.yaml"), imgsz=64, batch_size=3, workers=0, device="cpu",
        project=str(folder / "runs"), name=data, exist_ok=True, **flags,
    )  # fmt: skip
    return val.validate(config)


def test_classes_in_another_order_give_the_same_metrics(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = validate(folder, "same")
    assert right.map > 0.1
    assert "classes" not in capsys.readouterr().err
    by_name = validate(folder, "order", save_txt=True, save_json=True)
    out = capsys.readouterr()
    assert "in another order; they are matched by name" in out.out
    assert not out.err.count("warning")
    assert by_name.names == OTHER_ORDER
    np.testing.assert_allclose(by_name.ap, right.ap[[NAMES.index(n) for n in OTHER_ORDER]])
    np.testing.assert_allclose([by_name.map, by_name.precision, by_name.recall], [right.map, right.precision, right.recall])
    best = json.loads((folder / "runs/order/a_predictions.json").read_text())[0]
    truth = (folder / "reordered/labels/0.txt").read_text().splitlines()
    assert best["category_id"] == int(truth[0].split()[0])


@pytest.mark.parametrize("suffix", ["onnx", "torchscript"])
def test_names_of_an_exported_file_decide_too(folder: Path, suffix: str) -> None:
    from models import load_model
    from models.export.exporting import ExportOptions, export_model

    path = folder / f"a.{suffix}"
    export_model(load_model(folder / "a.pt"), suffix, path, ExportOptions(imgsz=(64, 64), batch_size=3))
    assert validate(folder, "order", path.name).map == pytest.approx(validate(folder, "same", path.name).map, abs=1e-9)


def test_other_names_are_said_in_one_line_and_go_by_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = validate(folder, "same")
    capsys.readouterr()
    assert validate(folder, "others").map == right.map
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "warning" in text]
    assert "apple, pear, fig" in line
    assert "red, blue, green" in line
    assert "by class number" in line
    for data in ("case", "numbers"):
        assert validate(folder, data).map == right.map
        assert "warning" not in capsys.readouterr().err


def test_order_of_names() -> None:
    assert class_order(("a", "b", "c"), ("c", "a", "b")) == [2, 0, 1]
    assert class_order(("A", "b"), ("B", "a")) == [1, 0]
    assert class_order(("a", "A"), ("A", "a")) == [1, 0]
    for own, wanted in ((("a", "b"), ("a", "c")), (("a", "a"), ("a", "a")), (("a", "b"), ("a", "a")), (("a", "b"), ("a",))):
        assert class_order(own, wanted) is None
    model = tiny_model(NAMES)
    assert in_order_of(model, NAMES) is model
    assert in_order_of(model, ("0", "1", "2")) is model
    assert in_order_of(tiny_model(("class0", "class1", "class2")), NAMES) is not None


def test_scores_follow_the_names_and_sizes_stay_known() -> None:
    model, images = tiny_model(NAMES).deploy(), torch.rand(2, 3, 64, 64)
    reordered = in_order_of(model, OTHER_ORDER)
    assert reordered is not None
    assert fixed_size(reordered) is None
    expected = model.predict(images)
    found = reordered.predict(images)
    torch.testing.assert_close(found.scores, expected.scores[..., [2, 0, 1]], rtol=0, atol=0)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=0)


def test_ensemble_matches_its_members_by_name() -> None:
    first, images = tiny_model(NAMES).deploy(), torch.rand(1, 3, 64, 64)
    second = tiny_model(OTHER_ORDER).deploy()
    scores = Ensemble([first, second], sources=["a.pt", "b.pt"]).predict(images).scores
    own = second.predict(images).scores
    torch.testing.assert_close(scores[:, -own.shape[1] :], own[..., [OTHER_ORDER.index(n) for n in NAMES]], rtol=0, atol=0)
