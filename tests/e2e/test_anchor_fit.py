"""Training asks the head to look at the boxes: anchors from another data set are replaced, suiting ones and --noautoanchor leave them."""

from __future__ import annotations

import pytest
import torch
import yaml

from models.checkpoints import load_model
from train import train
from utils.config import TrainConfig

ANCHORS = {"far": [[400, 410, 500, 520], [600, 620, 630, 610]], "near": [[8, 8, 16, 16], [28, 28, 60, 60]]}


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
    """Eight grey pictures with two boxes of 8 to 40 px each."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        for i in range(8):
            cv2.imwrite(str(tmp_path / f"data/images/{split}/{i}.png"), rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
            rows = [f"0 0.5 0.5 {w:.3f} {h:.3f}" for w, h in rng.uniform(8 / 64, 40 / 64, (2, 2))]
            (tmp_path / f"data/labels/{split}/{i}.txt").write_text("\n".join(rows))
    path = tmp_path / "data" / "small.yaml"
    path.write_text("train: images/train\nval: images/val\nnames: [thing]\n")
    return path


@pytest.mark.parametrize(("kind", "flags", "word"), [("far", {}, "replaced"), ("near", {}, "kept"), ("far", {"noautoanchor": True}, "")])
def test_anchors_follow_the_data(tmp_path, small_data, capsys, kind, flags, word):
    result = train(config(tmp_path, small_data, kind, **flags))
    printed = capsys.readouterr().out
    assert ("anchors: " in printed) == bool(word)
    assert word in printed
    head = load_model(result.best_weights).head
    given = torch.tensor(ANCHORS[kind], dtype=torch.float32).view(2, 2, 2)
    assert torch.allclose(head.anchors_px, given) == (word != "replaced")
