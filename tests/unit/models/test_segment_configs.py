"""Segmentation's configs: found by bare name, equal to detection's but for the head, and part A's blocks in two of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import build_model
from models.spec.channel_rules import LayerPlan
from models.spec.config_files import CONFIGS, find_config
from models.spec.parser import load_spec, plan_layers
from tests.unit.models.test_attention_configs import PART_A

NAMES = [f"{family}{scale}-seg" for family in ("yolov5", "yolov8", "yolo11", "yolo26") for scale in "nsmlx"]
NAMES += ["gelan-c-seg", "gelan-c-dseg", "yolov9-c-dseg", "yolov9c-seg"]
VARIANTS = sorted(path.stem for path in (CONFIGS / "attention").glob("yolov8-seg-*.yaml"))
DUAL = sorted(path.stem for path in (CONFIGS / "attention").glob("yolov9-c-dseg-*.yaml"))
INSERTED = 10  # the row of the block in the dual form


def plans(name: str) -> list[LayerPlan]:
    return plan_layers(load_spec(f"{name}.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_segmentation_config_is_found_and_planned(name):
    assert CONFIGS in find_config(Path(name))[0].parents
    head = plans(name)[-1]
    assert head.cls.task.name == "segment"
    detection = name.replace("-dseg", "").replace("-seg", "")
    mine, theirs = plans(name), plans(detection)
    same = len(theirs) - 1
    assert [(p.name, p.args, p.sources, p.out_channels) for p in mine[:same]] == [
        (p.name, p.args, p.sources, p.out_channels) for p in theirs[:same]
    ]  # fmt: skip


def test_every_block_of_part_a_is_there():
    published = {path.stem.removeprefix("yolov8-") for path in (CONFIGS / "attention").glob("yolov8-*.yaml")}
    assert {name.removeprefix("yolov8-seg-") for name in VARIANTS} == published & set(PART_A)
    assert len(VARIANTS) >= 11
    assert {name.removeprefix("yolov9-c-dseg-") for name in DUAL} >= {
        "FocalModulation",
        "BRA",
        "BiFormer",
        "BoT3",
        "CloAttention",
        "NLBlockND",
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_detections_with_another_head(name):
    mine, theirs = (load_spec(f"{n}.yaml") for n in (name, name.replace("-seg", "")))
    assert mine.rows[:-1] == theirs.rows[:-1]
    assert mine.rows[-1].source == theirs.rows[-1].source
    assert (mine.rows[-1].module, mine.rows[-1].args, mine.scales) == ("Segment", ("nc", 32, 256), theirs.scales)


@pytest.mark.parametrize("name", DUAL)
def test_a_dual_variant_has_one_row_more(name):
    base, variant = plans("yolov9-c-dseg"), plans(name)
    assert variant[INSERTED].out_channels == base[INSERTED - 1].out_channels
    kept = [*variant[:INSERTED], *variant[INSERTED + 1 :]]
    for plan, original in zip(kept, base, strict=True):
        assert (plan.name, plan.args, plan.out_channels) == (original.name, original.args, original.out_channels)
        moved = tuple(s + (s >= INSERTED) for s in original.sources)
        reads_block = INSERTED - 1 in original.sources and original.index == INSERTED  # SPPELAN reads the block
        assert plan.sources == ((INSERTED,) if reads_block else moved)


@pytest.mark.parametrize("name", [name.replace("yolov8", "yolov8n") for name in VARIANTS])
@torch.no_grad()
def test_a_variant_predicts_masks(name):
    model = build_model(f"{name}.yaml", nc=2).eval()
    found = model.predict(torch.rand(1, 3, 64, 96))
    assert found.fields["coefficients"].shape == (1, 126, 32)
    assert found.shared["prototypes"].shape == (1, 32, 16, 24)


def test_the_dual_form_with_a_block_deploys_to_one_branch():
    with torch.device("meta"):
        lean = build_model("yolov9-c-dseg-FocalModulation.yaml", nc=2).deploy(fuse=False)
    assert [plan.name for plan in lean.plans][-4:] == ["RepNCSPELAN4", "nn.Upsample", "Conv", "DSegment"]
    assert [plan.name for plan in lean.plans].count("FocalModulation") == 1
