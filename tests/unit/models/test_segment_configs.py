"""Segmentation's configs: found by bare name, equal to detection's but for the head, and part A's blocks in two of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import build_model
from models.spec.channel_rules import LayerPlan
from models.spec.config_files import CONFIGS, find_config
from models.spec.parser import load_spec
from models.spec.planning import plan_layers
from tests.unit.models.test_attention_configs import PART_A

NAMES = [f"{family}{scale}-seg" for family in ("yolov5", "yolov8", "yolo11", "yolo26") for scale in "nsmlx"]
NAMES += [f"gelan-{scale}-seg" for scale in "tsmc"] + [f"yolov9-{scale}-dseg" for scale in "tsmc"] + ["gelan-c-dseg", "yolov9c-seg"]
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


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("c-dseg-FocalModulation", 1), ("t-dseg", 0), *(pytest.param(f"{scale}-dseg", 0, marks=pytest.mark.slow) for scale in "smc")],
)
def test_the_dual_form_deploys_to_one_branch(name, blocks):
    with torch.device("meta"):
        lean = build_model(f"yolov9-{name}.yaml", nc=2).deploy(fuse=False)
    assert [plan.name for plan in lean.plans][-4:] == ["RepNCSPELAN4", "nn.Upsample", "Conv", "DSegment"]
    assert [plan.name for plan in lean.plans].count("FocalModulation") == blocks


@pytest.mark.parametrize("scale", "tsmc")
def test_prototypes_are_as_wide_as_the_finest_map(scale):
    for name in (f"gelan-{scale}-seg", f"yolov9-{scale}-dseg"):
        planned = plans(name)
        head, dual = planned[-1], name.endswith("-dseg")
        finest = planned[head.sources[3 if dual else 0]].out_channels  # a dual head reads the auxiliary maps first
        assert load_spec(f"{name}.yaml").rows[-1].args == ("nc", 32, finest), name
        if dual:
            assert [planned[row].out_channels for row in head.sources[-2:]] == [finest, finest]


@torch.no_grad()
def test_the_small_dual_form_predicts_masks_of_its_main_branch():
    model = build_model("yolov9-t-dseg.yaml", nc=2).eval()
    image = torch.rand(1, 3, 64, 96)
    found = model.predict(image)
    assert found.fields["coefficients"].shape == (1, 126, 32)
    assert found.shared["prototypes"].shape == (1, 32, 16, 24)
    lean = model.deploy().predict(image)
    torch.testing.assert_close(lean.shared["prototypes"], found.shared["prototypes"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lean.fields["coefficients"], found.fields["coefficients"], rtol=1e-4, atol=1e-4)
