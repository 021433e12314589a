"""The capacity control matches what it stands for, and starts as it does."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.study.control import KINDS, TOLERANCE, added_places, control_of, match
from models.build import build_model
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.edit.rows import edit
from models.layers.attention.ops.identity import IdentityStart
from models.layers.capacity import ConvControl
from models.model import Model
from models.spec.parser import load_spec
from tests.contract.test_attention_contract import PART_A
from tests.tiny import tiny_cfg
from utils.errors import UserError


@pytest.fixture(scope="module")
def yolov8n():
    return Model(load_spec("yolov8n.yaml", nc=3))


def added_rows(base, **edits) -> list[int]:
    """Parameters of the rows that edits add or change, counted in the network that is built from them."""
    edited = edit(base.spec, **edits)
    model = Model(edited.spec)
    return [sum(p.numel() for p in model.model[row].parameters()) for row in (*edited.inserted, *edited.replaced)]


@pytest.mark.parametrize("module", PART_A)
def test_control_of_each_part_a_module_is_within_two_percent_at_two_places(yolov8n, module):
    control = control_of(yolov8n, [f"{module}@4,backbone.last"], [], kind="params", imgsz=64)
    assert len(control.insertions) == 2, control.notes
    added, matched = added_rows(yolov8n, insert=f"{module}@4,backbone.last"), added_rows(yolov8n, insert=control.insertions)
    assert len(added) == len(matched) == 2
    for ours, theirs in zip(matched, added):
        assert abs(ours / theirs - 1) <= TOLERANCE


@pytest.mark.parametrize("module", ["FocalModulation", "BiLevelRoutingAttention", "NLBlockND", "iRMB"])
def test_control_matches_multiply_adds_where_asked(yolov8n, module):
    wanted = added_places(yolov8n, [f"{module}@4,9"], [], imgsz=192)
    control = control_of(yolov8n, [f"{module}@4,9"], [], kind="flops", imgsz=192)
    got = added_places(yolov8n, control.insertions, [], imgsz=192)
    assert [p.row for p in got] == [p.row for p in wanted] == [4, 9]
    for a, b in zip(got, wanted):
        assert abs(a.multiply_adds / b.multiply_adds - 1) <= TOLERANCE


def test_control_starts_as_the_identity_where_its_variant_does(yolov8n):
    images = torch.rand(1, 3, 64, 64)
    control = control_of(yolov8n, ["MHSA@9"], [], kind="params", imgsz=64, init="identity")
    edited = edit(yolov8n.spec, insert=control.insertions)
    model = Model(edited.spec).eval()
    assert isinstance(model.model[edited.inserted[0]], IdentityStart)
    plain = control_of(yolov8n, ["MHSA@9"], [], kind="params", imgsz=64)
    assert isinstance(Model(edit(yolov8n.spec, insert=plain.insertions).spec).model[edited.inserted[0]], ConvControl)
    base = copy.deepcopy(yolov8n).eval()
    model.load_state_dict({**model.state_dict(), **edited.renamed(base.state_dict())})
    with torch.no_grad():
        for ours, theirs in zip(model(images).main, base(images).main):
            assert torch.equal(ours, theirs)
    assert added_rows(yolov8n, insert=control.insertions)[0] == added_rows(yolov8n, insert=plain.insertions)[0] + 1  # gamma


def test_several_modules_and_positions_each_get_a_block(yolov8n):
    texts = ["CBAM@4,6", "EMA@detect(factor=8)", "ECA@9", "MHSA@9(init=identity)"]
    control = control_of(yolov8n, texts, [], kind="params", imgsz=64)
    rows = [text.split("@")[1].split("(")[0] for text in control.insertions]
    assert rows == ["4", "6", "15", "18", "21", "9"]
    assert [("init=identity" in text) for text in control.insertions] == [False] * 5 + [True]
    assert len(control.notes) == 1
    assert "ECA@9 adds 5 parameters" in control.notes[0]


def test_a_replacement_is_matched_by_a_block_behind_the_row_as_it_was(yolov8n):
    control = control_of(yolov8n, [], ["C2f=C2f_iRMB@6"], kind="params", imgsz=64)
    (text,) = control.insertions
    assert text.startswith("ConvControl@6")
    added = added_rows(yolov8n, replace="C2f=C2f_iRMB@6")[0] - sum(p.numel() for p in yolov8n.model[6].parameters())
    assert abs(added_rows(yolov8n, insert=text)[0] / added - 1) <= TOLERANCE


@pytest.mark.parametrize("module", ["SimAM", "ECA", "MLCA"])
def test_modules_smaller_than_any_block_say_so(yolov8n, module):
    control = control_of(yolov8n, [f"{module}@9"], [], kind="params", imgsz=64)
    assert control.insertions == ()
    assert "fewer than the smallest convolution block (1,029)" in control.notes[0]


def test_costs_of_a_design_are_those_of_the_block(yolov8n):
    for place in added_places(yolov8n, ["SE@9", "MHSA@4"], [], imgsz=64):
        for kind in KINDS:
            design = match(place, kind)
            if design is not None:
                block = ConvControl(place.channels, design.hidden, design.middle, design.kernel)
                assert sum(p.numel() for p in block.parameters()) == design.parameters(place.channels)
    text = "ConvControl@9(hidden=7, middle=5, kernel=5)"
    (place,) = added_places(yolov8n, [text], [], imgsz=64)
    assert place.multiply_adds == 4 * (256 * 12 + 25 * 35)
    assert place.parameters == 256 * 12 + 25 * 35 + 2 * (7 + 5 + 256)


def test_block_goes_through_yaml_and_checkpoint(tmp_path):
    cfg = tiny_cfg(attention=("ConvControl", [{"hidden": 3, "middle": 5, "kernel": 1}]))
    model = build_model(cfg, names=("a", "b"))
    save_checkpoint(tmp_path / "a.pt", Checkpoint(cfg=cfg, cfg_name="tiny.yaml", names=("a", "b"), weights=model.state_dict()))
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    again = build_model(checkpoint.cfg, names=("a", "b"))
    again.load_state_dict(checkpoint.weights)
    block = again.model[-2]
    assert isinstance(block, ConvControl)
    assert (block.cv1.conv.out_channels, block.cv2.conv.out_channels, block.cv2.conv.kernel_size) == (3, 5, (1, 1))
    images = torch.rand(1, 3, 64, 64)
    fused = again.deploy()  # convolutions and batch norms are folded
    assert torch.allclose(fused.predict(images).boxes, again.predict(images).boxes, atol=1e-3)


@pytest.mark.parametrize("cfg", ["yolov8n.yaml", "yolov8m.yaml", "yolov9-t.yaml"])
@pytest.mark.parametrize("module", ["BoT3", "iRMB"])
def test_attention_that_names_its_width_is_inserted_with_its_inputs(cfg, module):
    spec = load_spec(cfg, nc=3)
    edited = edit(spec, insert=f"{module}@backbone.last", init="identity")
    model, row = Model(edited.spec), edited.inserted[0]
    assert model.plans[row].out_channels == model.plans[row - 1].out_channels
    with pytest.raises(UserError, match="Conv chooses its own output"):
        edit(spec, insert="Conv@4")
