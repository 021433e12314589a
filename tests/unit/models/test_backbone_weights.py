"""Published classification weights in backbones that stand as rows; the state dicts are made with the published names and shapes."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from models.backbones.biformer import BiFormerBackbone
from models.backbones.cloformer import CloFormerBackbone
from models.backbones.focalnet import FocalNetBackbone
from models.edit.rows import edit
from models.spec.parser import load_spec
from models.transfer.backbone_weights import family_of, fill_backbone, load_backbone
from tests.golden import all_names, find
from utils.errors import UserError

WHOLE = {
    "FocalNet": (lambda: FocalNetBackbone(num_classes=1000), "yolov8-FocalNet-T-srf.yaml"),
    "BiFormer": (lambda: BiFormerBackbone(num_classes=1000), "yolov8-BiFormer-T.yaml"),
    "CloFormer": (lambda: CloFormerBackbone(num_classes=1000), "yolov8-CloFormer-XXS.yaml"),
}
STAGES = {"FocalNet": "FocalNetStage", "BiFormer": "BiFormerStage", "CloFormer": "CloFormerStage"}


@pytest.mark.parametrize("family", WHOLE)
def test_every_backbone_tensor_is_loaded(family):
    whole, cfg = WHOLE[family]
    model = build_model(cfg)
    report = fill_backbone(model, whole().state_dict(), origin="published.pth")
    stages = [row for row in report.rows if row.target is not None]
    assert all(row.landed == row.target_size == row.source_size for row in stages)
    assert report.of_target == 1.0
    assert 0.8 < report.of_source < 1.0  # the classifier
    assert "classifier" in str(report)
    assert {row.module for row in stages} <= {STAGES[family], "CloFormerStem"}


@pytest.mark.parametrize("golden", ["FocalNetBackbone", "BiFormerBackbone", "CloFormerBackbone"])
def test_published_key_names_identify_the_family(golden):
    if f"{golden}__case0" not in all_names("attention"):
        pytest.skip("needs the full reference vectors beside the project")
    names = [key for key, _ in find("attention", f"{golden}__case0").meta["keys"]]
    assert family_of(names) + "Backbone" == golden


def test_stages_are_found_at_any_row():
    spec = load_spec("yolov8-FocalNet-T-srf.yaml")
    first = next(i for i, row in enumerate(spec.rows) if row.module == "FocalNetStage")
    model = build_model(edit(spec, insert=f"SE@{first}").spec.to_dict())
    state = FocalNetBackbone(num_classes=10).state_dict()
    report = fill_backbone(model, state)
    assert report.of_target == 1.0
    assert torch.equal(model.state_dict()[f"model.{first + 2}.embed.proj.weight"], state["layers.0.downsample.proj.weight"])


def test_backbone_of_another_size_loads_matching_tensors():
    report = fill_backbone(build_model("yolov8-FocalNet-T-srf.yaml"), FocalNetBackbone(embed_dim=48).state_dict())
    assert report.of_target < 0.1


def test_unsuitable_backbone_files_are_refused():
    model = build_model("yolov8n.yaml")
    with pytest.raises(UserError, match=r"--backbone-weights x\.pth: not the published weights of FocalNet, BiFormer, CloFormer"):
        fill_backbone(model, {"conv1.weight": torch.ones(1)}, origin="x.pth")
    state = FocalNetBackbone(embed_dim=16).state_dict()
    with pytest.raises(UserError, match=r"holds FocalNet, but .* has no row FocalNetStage; give a --cfg .* yolov8-FocalNet-\*\.yaml"):
        fill_backbone(model, state)
    with pytest.raises(UserError, match=r"holds FocalNet, .* \(it has BiFormerStage\)"):
        fill_backbone(build_model("yolov8-BiFormer-T.yaml"), state)


@pytest.mark.parametrize("entry", ["model", None])
def test_published_file_layouts_are_read(tmp_path, entry):
    state = FocalNetBackbone(num_classes=10).state_dict()
    torch.save({entry: state, "epoch": 299} if entry else state, tmp_path / "focalnet.pth")
    model = build_model("yolov8-FocalNet-T-srf.yaml")
    report = load_backbone(model, tmp_path / "focalnet.pth")
    assert report.of_target == 1.0
