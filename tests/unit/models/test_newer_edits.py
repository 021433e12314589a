"""Attention in networks of YOLOv10 and later: before end-to-end heads, inside every block at once, and under every spelling."""

from __future__ import annotations

import pytest
import torch

from models.build import build_model
from models.edit.rows import Edited, edit
from models.model import Model
from models.spec import channel_rules as rules
from models.spec.parser import load_spec
from models.spec.planning import plan_layers
from models.spec.registry import BLOCKS
from tests.golden import fill_
from utils.errors import UserError

END_TO_END = ("yolov10n", "yolo26n")
HOSTS = ("C2f", "C2fCIB", "C3k2", "C2PSA", "A2C2f", "DSC3k2")
ANY = [name for name, block in BLOCKS.items() if block.kind == "attention" and block.channels is rules.same_width and block.built_in]


def everywhere(name: str, *, suffix: str) -> Edited:
    """The network with EMA inside every block that can hold it."""
    spec = load_spec(name, nc=3)
    rows = {row.module for row in spec.rows}
    return edit(spec, replace=[f"{host}={host}{suffix}" for host in HOSTS if host in rows])


def keys(edited: Edited) -> set[str]:
    """Of the network without the modules inside its blocks."""
    with torch.device("meta"):
        return {key for key in Model(edited.spec).state_dict() if ".attention." not in key}


@pytest.mark.parametrize(("name", "count"), [("yolov10n", 8), ("yolo11n", 9), ("yolo12n", 8), ("yolov13n", 8), ("yolo26n", 9)])
def test_modules_inside_every_block_keep_all_tensors_of_the_network_and_the_form_of_its_head(name, count):
    """Rows of YOLO12 with an area of -1 included; a head without these blocks before it would have other class convolutions."""
    plain = keys(edit(load_spec(name, nc=3)))
    for suffix in ("_EMA", "EMA"):
        edited = everywhere(name, suffix=suffix)
        assert len(edited.replaced) == count
        assert keys(edited) == plain


@pytest.mark.parametrize("option", ["factor=0", "factor=-1"])
def test_counts_of_the_module_inside_are_still_checked(option):
    with pytest.raises(UserError, match=r"factor should be at least 1"):
        edit(load_spec("yolo12n"), replace=f"A2C2f=A2C2f_EMA@6({option})")


@pytest.mark.parametrize("module", ["A2C2f", "A2C2f_EMA"])
def test_an_area_below_one_is_refused_where_attention_would_use_it(module):
    with pytest.raises(UserError, match=r"row 6 \[\w+\] with arguments \[.*\]: area attention: area should be at least 1, not -1$"):
        build_model(edit(load_spec("yolo12n"), replace=f"A2C2f={module}@6(512, True, -1)").spec.to_dict())


@pytest.mark.parametrize("name", END_TO_END)
def test_both_branches_of_an_end_to_end_head_read_the_module_before_it(name):
    """They share their inputs, so none is auxiliary: ``+aux`` asks for the same."""
    spec = load_spec(name, nc=3)
    head = plan_layers(spec)[-1]
    edited = edit(spec, insert="SE@detect", init="identity")
    assert edited.spec == edit(spec, insert="SE@detect+aux", init="identity").spec
    assert plan_layers(edited.spec)[-1].sources == edited.inserted
    assert [plan_layers(edited.spec)[row].sources for row in edited.inserted] == [(edited.rows[s],) for s in head.sources]


@pytest.mark.parametrize("name", END_TO_END)
def test_modules_before_an_end_to_end_head_outlive_deployment(name):
    torch.manual_seed(0)
    model = fill_(build_model(name, nc=3, attention=["SE@detect"]), 1.35)
    parts = model.train()(torch.rand(2, 3, 64, 64))
    sum(level.square().mean() for branch in parts.branches for level in branch).backward()
    inserted = [i for i, plan in enumerate(model.plans) if plan.name == "SE"]
    assert len(inserted) == 3
    for row in inserted:
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.model[row].parameters())
    model.eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        many, one = model(images).branches
        for for_suppression, wanted in ((False, one), (True, many)):
            deployed = model.deploy(for_suppression=for_suppression)
            assert sum(plan.name == "SE" for plan in deployed.plans) == 3
            assert len(deployed.head.branch_weights) == 1
            for got, raw in zip(deployed(images).main, wanted, strict=True):
                assert (got - raw).abs().max() <= 1e-5 * raw.abs().max()


@pytest.mark.parametrize("module", ANY)
def test_every_module_stands_inside_the_newer_blocks_and_in_a_row_behind_them(module):
    options = [{"init": "identity"}]
    blocks = [
        [f"C3k2_{module}", [64, False]], [f"C2PSA_{module}", [64, *options]], [f"A2C2f_{module}", [64, True, 4]], [module, options],
    ]  # fmt: skip
    rows = [[-1, 1, "Conv", [16, 3, 4]], [-1, 1, "Conv", [64, 3, 2]], *([-1, 1, *block] for block in blocks)]
    model = build_model({"nc": 2, "end2end": True, "reg_max": 1, "backbone": rows, "head": [[[-1], 1, "Detect", ["nc"]]]})
    output = model.train()(torch.rand(2, 3, 24, 40))
    sum(level.square().mean() for branch in output.branches for level in branch).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        predictions = model.eval().predict(torch.rand(1, 3, 24, 40))
    assert predictions.scores.shape == (1, 15, 2)
    assert torch.isfinite(predictions.boxes).all()
