"""The attention variants: each is its family's network with blocks inserted, nothing else moved, and it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from models.detector import build_model
from models.parser import CONFIGS, load_spec, plan_layers

VARIANTS = sorted(path.name for path in (CONFIGS / "attention").glob("*.yaml"))
INSERTED = [name for name in VARIANTS if re.fullmatch(r"yolov9-[tsmce]-\w+\.yaml", name)]
SMALLEST = [name for name in VARIANTS if re.match(r"yolov9-[t]-|yolov(5|8)[-\w]*|yolov7-tiny", name)]


def base_of(name: str) -> str:
    return re.match(r"(yolov9-[tsmce])-", name)[1] + ".yaml"


@pytest.mark.parametrize("name", INSERTED)
def test_only_the_blocks_are_new(name):
    """With the inserted rows taken out again, rows, arguments, widths and sources are those of the base."""
    base, variant = (plan_layers(load_spec(n)) for n in (base_of(name), name))
    kinds = {plan.name for plan in base}
    inserted = [plan for plan in variant if plan.name not in kinds]
    assert inserted, "nothing was inserted"
    assert any(Path(name).stem.split("-")[-1] in (plan.name, plan.cls.__name__) for plan in inserted)
    number, kept = {-1: -1}, []
    for plan in variant:
        if plan in inserted:
            number[plan.index] = number[plan.sources[0]]
        else:
            number[plan.index] = len(kept)
            kept.append(plan)
    assert len(kept) == len(base)
    for plan, original in zip(kept, base):
        assert (plan.name, plan.args, plan.out_channels, plan.repeats) == (
            original.name, original.args, original.out_channels, original.repeats
        )  # fmt: skip
        assert tuple(number[s] for s in plan.sources) == original.sources


@pytest.mark.parametrize("name", [n for n in INSERTED if "FocalModulation" in n])
def test_the_block_stands_on_the_way_to_sppelan_and_the_auxiliary_branch_goes_past_it(name):
    plans = plan_layers(load_spec(name))
    (block,) = [p for p in plans if p.name.startswith("FocalModulation")]
    readers = [p for p in plans if block.index in p.sources]
    assert [p.name for p in readers] == ["SPPELAN"]
    assert block.section == "backbone"


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_variants_run_at_rectangular_sizes(name):
    model = build_model(name, nc=3).eval()
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
