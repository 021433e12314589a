"""The attention variants: each is its family's network with blocks inserted or exchanged, nothing else moved, and it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models.build import build_model
from models.spec.channel_rules import LayerPlan
from models.spec.config_files import CONFIGS
from models.spec.parser import load_spec, read_spec
from models.spec.planning import plan_layers

OWN = ("FocalModulation", "FocalModulationBlock", "BRA", "nchwBRA", "BiFormer", "CloAttention", "NLBlockND", "BoT3", "BoTNet",
       "BiFormer-[TSB]", "FocalNet-[TSB]-[sl]rf", "CloFormer-(XXS|XS|S)")  # fmt: skip
NEWER = ("yolo11", "yolo12", "yolo26")
FAMILY = r"(yolov9-[tsmce]|yolov8(-p2)?|yolov5(-p2)?|yolov7(-tiny)?|yolo11|yolo12|yolo26(-p2)?)"
VARIANTS = sorted(p.name for p in (CONFIGS / "attention").glob("*.yaml") if re.fullmatch(f"{FAMILY}-({'|'.join(OWN)})(-head)?", p.stem))
WHOLE = [name for name in VARIANTS if re.search(r"-(BiFormer-|FocalNet|CloFormer)", name)]
EXCHANGED = ["yolov5-BoT3.yaml", *(f"{family}-BoT3{place}.yaml" for family in ("yolov8", *NEWER) for place in ("", "-head"))]
STAGES = [f"{family}-BoTNet.yaml" for family in ("yolov8", *NEWER)]
INSERTED = [name for name in VARIANTS if name not in (*WHOLE, *EXCHANGED, *STAGES)]
PART_A = ("BRA", "BRA-head", "BiFormer", "BoT3", "BoT3-head", "BoTNet", "CloAttention", "CloAttention-head", "FocalModulation", "NLBlockND",
          "NLBlockND-head", "nchwBRA")  # fmt: skip
WHOLE_NEWER = ("BiFormer-T", "FocalNet-T-srf", "FocalNet-T-lrf", "CloFormer-XXS")
# variant -> rows with a module inside, the block's name there
EMBEDDED = {
    "yolo11-C3k2_EMA": [(2, "C3k2_EMA"), (4, "C3k2_EMA"), (6, "C3k2_EMA"), (8, "C3k2_EMA")],
    "yolo11-C2PSA_FocalModulation": [(10, "C2PSA_FocalModulation")],
    "yolo12-C3k2_EMA": [(2, "C3k2_EMA"), (4, "C3k2_EMA")],
    "yolo12-A2C2f_FocalModulation": [(6, "A2C2f_FocalModulation"), (8, "A2C2f_FocalModulation")],
    "yolo26-C3k2_EMA": [(2, "C3k2_EMA"), (4, "C3k2_EMA"), (6, "C3k2_EMA"), (8, "C3k2_EMA")],
    "yolo26-C2PSA_FocalModulation": [(10, "C2PSA_FocalModulation")],
}  # fmt: skip
SMALL = [name for name in VARIANTS if not re.match(r"yolov9-[smce]|yolov7-B", name)]


def rows(name: str, *, width: float = 1.0, depth: float = 1.0, box_free: bool = True) -> dict[str, Any]:
    """A YAML's contents at a scale of its own; with ``box_free`` the head is YOLOv8's, so that the body can be tested for itself."""
    (path,) = CONFIGS.rglob(name)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "scales" in data:
        data["scales"] = {"n": [depth, width, 1024]}
    elif path.parent.name != "v9" and "yolov9" not in name:
        data["depth_multiple"], data["width_multiple"] = depth, width
    if box_free and not name.startswith("yolov9"):
        data.pop("anchors", None)
        data["head"][-1] = [data["head"][-1][0], 1, "Detect", ["nc"]]
    return data


def plans(name: str) -> list[LayerPlan]:
    return plan_layers(read_spec(rows(name), origin=name))


def base_of(name: str) -> str:
    family = re.match(FAMILY, name)[0]
    return {"yolov5": "yolov5s"}.get(family, family) + ".yaml"


def same_row(plan: LayerPlan, original: LayerPlan) -> bool:
    return (plan.name, plan.args, plan.out_channels, plan.repeats) == (
        original.name, original.args, original.out_channels, original.repeats
    )  # fmt: skip


@pytest.mark.parametrize("name", INSERTED)
def test_variant_without_inserted_rows_equals_its_base(name):
    """With the inserted rows taken out again, rows, arguments, widths and sources are those of the base."""
    base, variant = plans(base_of(name)), plans(name)
    kinds = {plan.name for plan in base}
    inserted = [plan for plan in variant if plan.name not in kinds]
    block = re.sub(r"-head$", "", Path(name).stem).split("-")[-1]
    assert {p.name for p in inserted} == {{"BRA": "BiLevelRoutingAttention", "BiFormer": "BiFormerBlock"}.get(block, block)}
    assert len(inserted) == (3 if "-head" in name else 1)
    number, kept = {-1: -1}, []
    for plan in variant:
        if plan in inserted:
            number[plan.index] = number[plan.sources[0]]
        else:
            number[plan.index] = len(kept)
            kept.append(plan)
    assert len(kept) == len(base)
    for plan, original in zip(kept, base):
        assert same_row(plan, original)
        assert tuple(number[s] for s in plan.sources) == original.sources


@pytest.mark.parametrize("name", [n for n in INSERTED if not n.startswith("yolov9")])
def test_output_of_every_block_is_read(name):
    """What an inserted block reads is read by nothing else, except where the base's neck taps a stage of the backbone."""
    variant = plans(name)
    read = {s for plan in variant for s in plan.sources}
    assert read == set(range(-1, len(variant) - 1))


@pytest.mark.parametrize("name", [n for n in INSERTED if "-head" in n or "-p2-" in n])
def test_the_head_reads_the_blocks(name):
    variant = plans(name)
    kinds = [variant[s].name for s in variant[-1].sources]
    own = {p.index for p in variant} & {s for s in variant[-1].sources if variant[s].name not in ("C2f", "C3", "C3k2", "A2C2f")}
    assert len(own) == (3 if "-head" in name else 1), kinds


@pytest.mark.parametrize("name", EXCHANGED)
def test_variant_replaces_one_row(name):
    differing = [(new, old) for new, old in zip(plans(name), plans(base_of(name)), strict=True) if not same_row(new, old)]
    assert [(new.name, new.out_channels, new.sources) for new, _ in differing] == [
        ("BoT3", old.out_channels, old.sources) for _, old in differing
    ]  # fmt: skip
    assert len(differing) == 1


@pytest.mark.parametrize("family", NEWER)
def test_newer_families_have_every_block_of_part_a(family):
    assert {f"{family}-{variant}.yaml" for variant in PART_A} <= set(VARIANTS)


@pytest.mark.parametrize("name", STAGES)
def test_the_papers_stage_replaces_the_last_stage_and_its_convolution(name):
    base, variant = plans(base_of(name)), plans(name)
    assert (variant[7].name, variant[7].args[2], variant[7].out_channels) == ("BoTNetStage", 3, base[8].out_channels)
    kept = [*variant[:7], *variant[8:]]
    for plan, original in zip(kept, [*base[:7], *base[9:]], strict=True):
        assert same_row(plan, original)
        assert plan.sources == tuple(s - (s > 7) for s in original.sources)


@pytest.mark.parametrize("name", EMBEDDED)
def test_variant_with_modules_inside_blocks_differs_in_their_names_only(name):
    base, variant = plans(base_of(name)), plans(f"{name}.yaml")
    assert [(p.index, p.name) for p, o in zip(variant, base, strict=True) if p.name != o.name] == EMBEDDED[name]
    assert [(p.args, p.out_channels, p.repeats, p.sources) for p in variant] == [
        (p.args, p.out_channels, p.repeats, p.sources) for p in base
    ]  # fmt: skip


@pytest.mark.parametrize("family", NEWER)
def test_newer_variants_have_their_familys_scales_and_keys(family):
    def keys(path: Path) -> dict[str, Any]:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {key: value for key, value in data.items() if key not in ("backbone", "head")}

    (base,) = CONFIGS.glob(f"v*/{family}.yaml")
    variants = [p for p in (CONFIGS / "attention").glob(f"{family}-*.yaml") if not re.search(r"-(seg|pose|obb|cls)-", p.name)]
    whole = [path for path in variants if path.name in WHOLE]
    assert len(variants) >= len(PART_A) + 2 + len(WHOLE_NEWER)
    assert all(keys(path) == keys(base) for path in variants if path not in whole)
    assert all(keys(path) == {**keys(base), "scales": {"s": [1, 1, 1024]}} for path in whole)


@pytest.mark.parametrize("family", NEWER)
@pytest.mark.parametrize("backbone", WHOLE_NEWER)
def test_newer_families_have_whole_backbones_under_their_own_neck(family, backbone):
    """What stands behind the stages is the s scale of the family; the stages are those of the YOLOv8 variant."""
    variant, model = plans(f"{family}-{backbone}.yaml"), plan_layers(load_spec(f"{family}s.yaml"))
    v8 = plans(f"yolov8-{backbone}.yaml")
    stages = [p for p in variant if p.name.startswith(backbone.split("-")[0])]
    assert [p.args for p in stages] == [p.args for p in v8[: len(stages)]]

    def written(rows):
        """What the rows say whose widths do not follow from the backbone's."""
        own = [p for p in rows if p.name not in ("Concat", "Detect", "nn.Upsample")]
        return [(p.name, p.out_channels, p.repeats, p.args[2:]) for p in own]

    kept = [p for p in model if p.section == "head"]
    ours = [p for p in variant if p.section == "head"]
    assert written(ours) == written(kept)
    assert [p.name for p in ours] == [p.name for p in kept]
    assert (ours[-1].cls, ours[-1].kwargs) == (kept[-1].cls, kept[-1].kwargs)


@pytest.mark.parametrize("name", [n for n in INSERTED if n.startswith("yolov9")])
def test_block_feeds_sppelan_and_the_auxiliary_branch_bypasses_it(name):
    variant = plans(name)
    (block,) = [p for p in variant if p.name.startswith("FocalModulation")]
    assert [p.name for p in variant if block.index in p.sources] == ["SPPELAN"]
    assert block.section == "backbone"


@pytest.mark.parametrize("name", WHOLE)
def test_whole_backbones_give_every_stride_once(name):
    variant = plans(name)
    last = [p.name for p in variant if p.section == "backbone"][-1]
    assert last == {"yolo11": "C2PSA", "yolo26": "C2PSA", "yolo12": variant[3].name}.get(name.split("-")[0], "SPPF")
    assert len(variant[-1].sources) == 3
    stages = [p for p in variant if p.name.endswith("Stage")]
    assert len(stages) == 4
    read = {s for plan in variant for s in plan.sources}
    assert read == set(range(-1, len(variant) - 1))


@pytest.mark.parametrize("name", SMALL)
def test_small_scales_run_at_rectangular_sizes(name):
    if name in WHOLE and not re.search("-(T-srf|T|XXS).yaml", name):
        pytest.skip("a larger size of a backbone that is run")
    scale = {} if name in WHOLE else {"width": 0.25, "depth": 0.33}
    model = build_model(rows(name, **scale), nc=3).eval()
    assert tuple(model.strides)[:-3] in ((), (4.0,), (8.0, 16.0, 32.0))
    assert tuple(model.strides)[-3:] == (8.0, 16.0, 32.0)
    with torch.no_grad():
        predictions = model.predict(torch.rand(1, 3, 64, 128))
    assert predictions.boxes.shape[2] == 4
    assert predictions.scores.shape[2] == 3
    assert torch.isfinite(predictions.boxes).all()


@pytest.mark.parametrize("name", ["yolov9-t-FocalModulation.yaml"])
def test_deployed_variant_keeps_its_block_and_its_output(name):
    model = build_model(name, nc=3).eval()
    deployed = model.deploy()
    assert any(plan.name == "FocalModulation" for plan in deployed.plans)
    assert len(deployed.plans) < len(model.plans)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = model.predict(images), deployed.predict(images)
    assert torch.allclose(ours.boxes, theirs.boxes, atol=1e-2)
    assert torch.allclose(ours.scores, theirs.scores, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["yolov8-BRA.yaml", "yolov8-NLBlockND-head.yaml", "yolov9-t-FocalModulation.yaml", "yolo26-NLBlockND-head.yaml"]
)
def test_identity_start_keeps_the_output_of_the_base_network(name):
    base = build_model(rows(base_of(name), width=0.25, depth=0.33), nc=3).eval()
    kinds = {plan.name for plan in base.plans}
    data = rows(name, width=0.25, depth=0.33)
    for row in (*data["backbone"], *data["head"]):
        if row[2] not in (*kinds, "Upsample") and not row[2].startswith("nn."):
            row[3] = [*row[3], {"init": "identity"}]
    model = build_model(data, nc=3).eval()
    kept = [layer for plan, layer in zip(model.plans, model.model) if not plan.identity_start]
    assert len(kept) == len(base.model) < len(model.model)
    for layer, original in zip(kept, base.model):
        layer.load_state_dict(original.state_dict())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = model.predict(images), base.predict(images)
    assert torch.equal(ours.boxes, theirs.boxes)
    assert torch.equal(ours.scores, theirs.scores)
