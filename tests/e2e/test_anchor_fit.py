"""Training asks the head to look at the boxes: anchors of another data set are replaced and mere counts filled in, suiting ones stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

from models.checkpoints.checkpoint import load_model
from tests.image_files import write_images
from train import train
from utils.config import TrainConfig

ANCHORS = {"far": [[400, 410, 500, 520], [600, 620, 630, 610]], "near": [[8, 8, 16, 16], [28, 28, 60, 60]], "counted": 2}
GUESS = [[[24.0, 24.0], [24.0, 48.0]], [[48.0, 48.0], [48.0, 96.0]]]


def config(tmp_path, small_data, kind, **flags) -> TrainConfig:
    network = {
        "nc": 1,
        "anchors": ANCHORS[kind],
        "backbone": [[-1, 1, "Conv", [c, 3, 2]] for c in (8, 16, 16, 32)],
        "head": [[[2, 3], 1, "Detect", ["nc", "anchors"]]],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(network))
    settings = {"imgsz": 64, "epochs": 1, "batch_size": 4, "workers": 0, "device": "cpu", "noplots": True, "project": f"{tmp_path}/runs"}
    return TrainConfig(cfg=str(tmp_path / "tiny.yaml"), data=str(small_data), **settings, **flags)


@pytest.fixture
def small_data(tmp_path):
    """Eight grey images with two boxes of 8 to 40 px each."""
    sizes = np.random.default_rng(0).uniform(8 / 64, 40 / 64, (2, 8, 2, 2))
    labels = {split: [[(0, 0.5, 0.5, w, h) for w, h in image] for image in part] for split, part in zip(("train", "val"), sizes)}
    return write_images(tmp_path / "data", labels)


OFF = {"noautoanchor": True}


@pytest.mark.parametrize(
    ("kind", "flags", "line"),
    [
        ("far", {}, "anchors: replaced (0.00 anchors a box, best possible recall 0.0000; now 1.0000) by "),
        ("near", {}, "anchors: kept ("),
        ("far", OFF, "anchors: kept, as --noautoanchor says (0.00 anchors a box"),
        ("counted", {}, "anchors: fitted to the data ("),
        ("counted", OFF, "anchors: the first guess, as --noautoanchor says ("),
    ],
)
def test_anchors_are_kept_replaced_or_fitted_as_the_data_require(tmp_path, small_data, capsys, kind, flags, line):
    result = train(config(tmp_path, small_data, kind, **flags))
    lines = [text for text in capsys.readouterr().out.splitlines() if text.startswith("anchors: ")]
    assert len(lines) == 1
    assert lines[0].startswith(line)
    head = load_model(result.best_weights).head
    given = torch.tensor(GUESS if kind == "counted" else ANCHORS[kind], dtype=torch.float32).view(2, 2, 2)
    assert torch.allclose(head.anchors_px, given) == ("replaced" not in line and "fitted" not in line)


def test_fitted_anchors_are_kept_when_training_from_a_checkpoint(tmp_path, small_data, capsys):
    """The YAML still only counts them, but the checkpoint's are a choice, not a guess."""
    first = train(config(tmp_path, small_data, "counted"))
    fitted = load_model(first.best_weights).head.anchors_px
    capsys.readouterr()
    second = train(config(tmp_path, small_data, "counted").replace(weights=str(first.best_weights)))
    assert "anchors: kept (" in capsys.readouterr().out
    assert torch.equal(load_model(second.best_weights).head.anchors_px, fitted)


def test_cfg_keeps_its_anchors_and_weights_alone_keep_theirs(tmp_path, small_data, capsys):
    weights = str(train(config(tmp_path, small_data, "far")).best_weights)
    fitted = load_model(weights).head.anchors_px
    capsys.readouterr()
    given = train(config(tmp_path, small_data, "far", weights=weights, **OFF))
    assert "  anchors        those that tiny.yaml lists stay; the checkpoint has others\n" in capsys.readouterr().out
    assert load_model(given.best_weights).head.anchors_px.flatten().tolist() == [float(v) for level in ANCHORS["far"] for v in level]
    alone = train(config(tmp_path, small_data, "far", weights=weights).replace(cfg=""))
    assert "anchors: kept (" in capsys.readouterr().out
    assert torch.equal(load_model(alone.best_weights).head.anchors_px, fitted)
