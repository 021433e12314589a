"""Several weights as one, test-time augmentation in validation, and the two studies of val.py, from the command line."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import detect
import val
from engine.evaluation.evaluate import EvaluationOptions, evaluate
from engine.evaluation.validate import open_data
from engine.inference.augmented import AugmentedModel
from engine.inference.ensemble import Ensemble
from models import build_model, load_model
from models.checkpoints.checkpoint import Checkpoint, save_checkpoint
from tests.golden import fill_
from tests.tiny import NAMES, tiny_cfg, tiny_checkpoint, tiny_model
from utils.cli.detect_arguments import DetectConfig
from utils.cli.val_arguments import ValConfig
from utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images labelled with part of what the first checkpoint finds on them, a second checkpoint, and one of other classes."""
    root = tmp_path_factory.mktemp("studies")
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (root / part).mkdir()
    for i in range(4):
        cv2.imwrite(str(root / f"images/{i}.png"), rng.integers(0, 255, (64, 96, 3), dtype=np.uint8))
    names = ", ".join(f'"{n}"' for n in NAMES)
    (root / "data.yaml").write_text(f"path: .\ntrain: images\nval: images\nnames: [{names}]\n", encoding="utf-8")
    tiny_checkpoint(root / "a.pt", config={"data": str(root / "data.yaml")})
    second = fill_(build_model(tiny_cfg(), names=NAMES), 1.0)
    save_checkpoint(root / "b.pt", Checkpoint(cfg=tiny_cfg(), cfg_name="tiny.yaml", names=NAMES, weights=second.state_dict()))
    tiny_checkpoint(root / "other.pt", names=("x", "y", "z"))
    flags = ["--img", "96", "--conf", "0.3", "--save-txt", "--nosave", "--project", str(root), "--name", "f"]
    assert detect.main(["--weights", str(root / "a.pt"), "--source", str(root / "images"), *flags]) == 0
    for i in range(4):
        found = (root / f"f/labels/{i}.txt").read_text().splitlines()
        (root / f"labels/{i}.txt").write_text("\n".join(found[i : i + 6]))
    return root


def config(folder: Path, name: str, *weights: str, **flags: object) -> ValConfig:
    files = [str(folder / w) for w in weights]
    return ValConfig(
        weights=files[0], others=tuple(files[1:]), imgsz=96, batch_size=4, workers=0, device="cpu", project=str(folder / "runs"), name=name,
        **flags,
    )  # fmt: skip


def test_ensemble_concatenates_the_predictions_of_each_model(folder: Path) -> None:
    models = [load_model(folder / name).deploy() for name in ("a.pt", "b.pt")]
    images = torch.rand(2, 3, 64, 96)
    joined = Ensemble(models, sources=["a.pt", "b.pt"]).predict(images)
    parts = [m.predict(images) for m in models]
    assert torch.equal(joined.boxes, torch.cat([p.boxes for p in parts], dim=1))
    assert torch.equal(joined.scores, torch.cat([p.scores for p in parts], dim=1))


def test_ensemble_of_one_model_twice_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = val.validate(config(folder, "alone", "a.pt"))
    twice = val.validate(config(folder, "twice", "a.pt", "a.pt"))
    both = val.validate(config(folder, "both", "a.pt", "b.pt"))
    assert alone.map > 0.05  # as the labels are its own detections
    np.testing.assert_allclose(twice.ap, alone.ap)
    assert np.array_equal(twice.confusion, alone.confusion)
    assert both.precision != alone.precision
    other = val.main(["--weights", str(folder / "a.pt"), str(folder / "other.pt"), "--img", "96", "--workers", "0"])
    assert other == 1
    assert "other.pt knows other classes than" in capsys.readouterr().err


def test_detect_takes_several_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def labels(*weights: str) -> str:
        name = "-".join(w[0] for w in weights)
        flags = ["--img", "96", "--conf", "0.1", "--iou", "0.9", "--save-txt", "--project", str(folder / "found"), "--name", name]
        assert detect.main(["--weights", *(str(folder / w) for w in weights), "--source", str(folder / "images/0.png"), *flags]) == 0
        return (folder / "found" / name / "labels/0.txt").read_text()

    alone = labels("a.pt")
    assert alone
    assert labels("a.pt", "a.pt") == alone
    assert labels("a.pt", "b.pt") != alone
    with pytest.raises(UserError, match="--visualize: several models"):
        detect.detect(DetectConfig(weights=str(folder / "a.pt"), others=(str(folder / "b.pt"),), visualize=True))


def test_augmented_validation_measures_augmented_predictions(folder: Path) -> None:
    augmented = val.validate(config(folder, "tta", "a.pt", augment=True))
    one = config(folder, "by-hand", "a.pt")
    _, loader = open_data(replace(one, data=str(folder / "data.yaml")), tiny_model())
    options = EvaluationOptions(device=torch.device("cpu"), progress=False)
    by_hand = evaluate(AugmentedModel(load_model(folder / "a.pt").deploy()), loader, options)
    plain = val.validate(config(folder, "plain", "a.pt"))
    np.testing.assert_allclose(augmented.ap, by_hand.ap)
    assert augmented.map > 0
    assert augmented.precision != plain.precision


def test_speed_prints_every_file_at_two_batch_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(folder / "a.pt"), str(folder / "b.pt")]
    flags = ["--task", "speed", "--data", str(folder / "data.yaml"), "--img", "96", "--batch", "4", "--workers", "0"]
    assert val.main(["--weights", *files, *flags, "--project", str(folder / "speed")]) == 0
    rows = re.findall(r"^ *\S*([ab]\.pt) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [(r[0], r[1]) for r in rows] == [("a.pt", "1"), ("a.pt", "4"), ("b.pt", "1"), ("b.pt", "4")]
    for *_, prepare, inference, suppression, total in rows:
        assert float(total) == pytest.approx(float(prepare) + float(inference) + float(suppression), abs=0.2)


def test_study_measures_every_size_and_plots_the_trade_off(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "study", "--study-sizes", "64", "96", "--data", str(folder / "data.yaml"), "--batch", "4", "--workers", "0"]
    assert val.main(["--weights", str(folder / "a.pt"), *flags, "--project", str(folder / "study")]) == 0
    with open(folder / "study/exp/study.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["imgsz"] for row in rows] == ["64", "96"]
    alone = val.validate(config(folder, "at-96", "a.pt", data=str(folder / "data.yaml")))
    assert alone.map > 0.05
    assert float(rows[1]["mAP_0.5:0.95"]) == pytest.approx(alone.map, abs=1e-5)
    assert cv2.imread(str(folder / "study/exp/study.png")).std() > 0
    assert val.main(["--task", "study"]) == 1
    assert "--task study: which --weights?" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["study", "speed"])
def test_a_study_checks_every_file_before_it_starts(folder: Path, capsys: pytest.CaptureFixture[str], task: str) -> None:
    """A file of other classes, one that is missing, and one of fixed size among the sizes: nothing is validated, no folder is made."""
    from models.export.exporting import ExportOptions, export_model

    four = tiny_checkpoint(folder / "four.pt", names=(*NAMES, "x"))
    export_model(load_model(folder / "a.pt"), "onnx", folder / "fixed.onnx", ExportOptions(imgsz=(64, 64), batch_size=4))
    flags = ["--task", task, "--study-sizes", "64", "96", "--data", str(folder / "data.yaml"), "--batch", "4", "--workers", "0"]
    cases = [(four, "3 classes, but"), (folder / "nowhere.pt", "nowhere.pt")]
    cases += [(folder / "fixed.onnx", "made for 64 px, not for 96")] if task == "study" else []
    for second, message in cases:
        made = folder / f"unmade-{task}"
        assert val.main(["--weights", str(folder / "a.pt"), str(second), *flags, "--project", str(made)]) == 1
        text = capsys.readouterr()
        assert message in text.err
        assert text.err.count("\n") == 1
        assert "mAP50" not in text.out
        assert not made.exists()
