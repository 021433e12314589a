"""What a training starts from: several sources, their reports, and what is frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.training.initial_weights import FrozenLayers, check_flags, freeze, transfer_weights
from models import build_model
from models.backbones.focalnet import FocalNetBackbone
from models.checkpoints.checkpoint import load_checkpoint
from tests.tiny import tiny_cfg, tiny_checkpoint, tiny_model
from utils.config import TrainConfig
from utils.errors import UserError

SMALL_FOCALNET: dict[str, Any] = {
    "nc": 2, "scales": {"n": [1.0, 1.0, 1024]},
    "backbone": [[-1, 1, "FocalNetStage", [8, 4]], [-1, 2, "FocalNetStage", [16]], [-1, 1, "Conv", [16, 1, 1]]],
    "head": [[[1, 2], 1, "Detect", ["nc"]]],
}  # fmt: skip


def test_backbone_weights_write_a_report_and_freeze_loaded_tensors(tmp_path, capsys):
    whole = FocalNetBackbone(embed_dim=8, depths=(1, 2), num_classes=5)
    torch.save({"model": whole.state_dict()}, tmp_path / "focalnet.pth")
    config = TrainConfig(backbone_weights=tmp_path / "focalnet.pth", weights_report=tmp_path / "report.csv", freeze="pretrained")
    check_flags(config)
    model = build_model(SMALL_FOCALNET)
    reports = transfer_weights(model, config, None)
    said = capsys.readouterr().out
    assert "focalnet.pth: transferred" in said
    assert "100 % of the network's are filled" in said
    assert (tmp_path / "report.csv").read_text(encoding="utf-8").count("FocalNetStage") == 2
    assert torch.equal(model.state_dict()["model.1.embed.proj.weight"], whole.state_dict()["layers.0.downsample.proj.weight"])
    frozen = freeze(model, config, reports)
    assert frozen.rows == (0, 1)
    assert not any(p.requires_grad for p in model.model[:2].parameters())
    assert all(p.requires_grad for p in model.model[2].parameters())
    assert FrozenLayers.from_dict(frozen.to_dict()) == frozen


def test_weights_and_backbone_weights_write_one_report_each(tmp_path):
    torch.save(FocalNetBackbone(embed_dim=8, depths=(1, 2)).state_dict(), tmp_path / "focalnet.pth")
    path = tiny_checkpoint(tmp_path / "best.pt")
    config = TrainConfig(weights=path, backbone_weights=tmp_path / "focalnet.pth", weights_report=tmp_path / "report.md")
    transfer_weights(build_model(SMALL_FOCALNET), config, load_checkpoint(path))
    assert "best.pt" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "focalnet.pth" in (tmp_path / "report-backbone.md").read_text(encoding="utf-8")


def test_weights_without_a_match_give_a_warning(tmp_path, capsys):
    path = tiny_checkpoint(tmp_path / "best.pt")
    head = [[0, 1], 1, "Detect", [4, [[9, 9], [30, 30]]]]
    wide = {**SMALL_FOCALNET, "backbone": [[-1, 1, "Conv", [24, 5, 2]], [-1, 1, "SE", []]], "head": [head]}
    transfer_weights(build_model(wide), TrainConfig(weights=path), load_checkpoint(path))
    assert "nothing of" in capsys.readouterr().err


def test_a_row_filled_in_part_trains_the_rest(tmp_path):
    path = tiny_checkpoint(tmp_path / "best.pt", names=("a", "b"))
    config = TrainConfig(weights=path, freeze="pretrained")
    model = build_model(tiny_cfg(), names=("b", "c", "d"))
    frozen = freeze(model, config, transfer_weights(model, config, load_checkpoint(path)))
    assert 8 not in frozen.rows
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.8.cv3.{level}.2.{part}" for level in range(3) for part in ("weight", "bias")}


def test_numbers_freeze_whole_layers():
    model = tiny_model()
    assert freeze(model, TrainConfig(freeze=2), ()).rows == (0, 1)
    assert not any(p.requires_grad for p in model.model[:2].parameters())
    with pytest.raises(UserError, match="layer 40 is not there, the model has layers 0 to 8"):
        freeze(model, TrainConfig(freeze=(1, 40)), ())
