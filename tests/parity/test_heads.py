"""Heads against the published ones: parameter lists, raw maps, decoded boxes and scores."""

from __future__ import annotations

import pytest
import torch

from models.heads.anchor_based import AnchorDetect, IAuxDetect, IDetect
from models.heads.anchor_free import DDetect, Detect, DetectV9, Head
from models.heads.multi_branch import DualDDetect, DualDetect, TripleDDetect
from tests import golden
from utils.boxes import cxcywh_to_xyxy

HEADS = {
    "v8_Detect": Detect,
    "v9_Detect": DetectV9,
    "v9_DDetect": DDetect,
    "v9_DualDetect": DualDetect,
    "v9_DualDDetect": DualDDetect,
    "v9_TripleDDetect": TripleDDetect,
}
FOLDED = "v7_IDetect_nc4_fused_weights"
ANCHORED = {"v5_Detect_nc4": AnchorDetect, "v7_Detect_nc4": AnchorDetect, "v7_IDetect_nc4": IDetect, "v7_IAuxDetect_nc4": IAuxDetect}
END_TO_END = ("v10_Detect", "v26_Detect")  # in test_heads_end_to_end.py; pose estimation is in test_pose.py
CASES = [
    n for n in golden.all_names("heads") if n not in (*ANCHORED, FOLDED) and not n.startswith(END_TO_END) and "_Pose_" not in n
]


def built(case: golden.Golden, name: str) -> Head:
    args = case.meta["args"]
    head = HEADS[name.rsplit("_nc", 1)[0]](args["nc"], args["ch"])
    head.set_strides(args["stride"])
    return golden.fill_(head).eval()


def test_golden_cases_exist():
    assert CASES


@pytest.mark.parametrize("name", golden.cases("heads", CASES, "names"))
def test_parameter_names_shapes_and_order_match(name):
    case = golden.find("heads", name)
    assert [[k, list(v.shape)] for k, v in built(case, name).state_dict().items()] == case.meta["keys"]


@pytest.mark.parametrize("name", golden.cases("heads", CASES))
@torch.no_grad()
def test_raw_maps_and_predictions_match(name):
    case = golden.find("heads", name)
    head = built(case, name)
    output = head([case.tensor(f"input_{i}") for i in range(len(case.meta["args"]["ch"]))])
    prefixes = {1: ("raw_",), 2: ("raw_aux_", "raw_main_"), 3: (None, None, "raw_third_")}[len(head.branch_weights)]
    for maps, prefix in zip(output.branches, prefixes):
        for level, raw in enumerate(maps if prefix else ()):
            golden.assert_close(raw, case.tensor(f"{prefix}{level}"), 1e-5, f"{prefix}{level}")
    decoded = next(case.tensor(k) for k in ("decoded", "decoded_main", "decoded_third") if k in case.arrays)  # (B, 4 + nc, N), cxcywh
    predictions = head.decode(output)
    golden.assert_close(predictions.boxes, cxcywh_to_xyxy(decoded[:, :4].transpose(1, 2)), 1e-4, "boxes")
    golden.assert_close(predictions.scores, decoded[:, 4:].transpose(1, 2), 1e-4, "scores")


def test_the_auxiliary_branch_decodes_as_published():
    case = golden.find("heads", "v9_DualDDetect_nc4")
    head = built(case, "v9_DualDDetect_nc4")
    output = head([case.tensor(f"input_{i}") for i in range(6)])
    boxes, scores = head.decode(output._replace(branches=output.branches[:1]))
    golden.assert_close(boxes, cxcywh_to_xyxy(case.tensor("decoded_aux")[:, :4].transpose(1, 2)), 1e-4)
    golden.assert_close(scores, case.tensor("decoded_aux")[:, 4:].transpose(1, 2), 1e-4)


def built_with_anchors(name: str) -> tuple[golden.Golden, Head]:
    case = golden.find("heads", name)
    args = case.meta["args"]
    head = ANCHORED[name](args["nc"], args["anchors"], args["ch"])
    head.set_strides(args["stride"])
    return case, golden.fill_(head).eval()


@pytest.mark.parametrize("name", [n for n in ANCHORED if n in golden.all_names("heads")])
@torch.no_grad()
def test_anchor_based_heads_match(name):
    case, head = built_with_anchors(name)
    keys = [[k, list(v.shape)] for k, v in head.state_dict().items()]
    assert keys == [k for k in case.meta["keys"] if k[0] != "anchor_grid" or name != "v7_Detect_nc4"]  # the plain one keeps no copy in px
    output = head([case.tensor(f"input_{i}") for i in range(len(case.meta["args"]["ch"]))])
    for level, raw in enumerate(output.main):
        wanted = case.tensor(f"raw_{level}").permute(0, 1, 4, 2, 3).flatten(1, 2)
        golden.assert_close(raw, wanted, 1e-5, f"raw {level}")
    decoded = case.tensor("decoded")  # (B, N, 5 + nc), cxcywh
    predictions = head.decode(output)
    golden.assert_close(predictions.boxes, cxcywh_to_xyxy(decoded[..., :4]), 1e-4, "boxes")
    golden.assert_close(predictions.scores, decoded[..., 4:5] * decoded[..., 5:], 1e-4, "scores")


@torch.no_grad()
def test_folded_implicit_layers_give_the_same_output():
    case, head = built_with_anchors("v7_IDetect_nc4")
    wanted = golden.find("heads", FOLDED)
    lean = head.deploy().head
    for key in ("m.0.weight", "m.0.bias", "m.1.weight", "m.1.bias", "m.2.weight", "m.2.bias"):
        golden.assert_close(lean.state_dict()[key], wanted.tensor(key.replace(".", "__")), 1e-6, key)
    x = [case.tensor(f"input_{i}") for i in range(3)]
    for got, raw in zip(lean(x).main, head(x).main):
        golden.assert_close(got, raw, 1e-5)


@pytest.mark.parametrize("name", [n for n in ANCHORED if n in golden.all_names("heads")])
def test_published_state_dicts_load_with_or_without_the_anchors_in_px(name):
    """YOLOv7 also stores ``anchor_grid``; a plain head takes such a file, and keeps only ``anchors``."""
    case, head = built_with_anchors(name)
    published = {key: torch.full(shape, 7.0) for key, shape in case.meta["keys"]}
    with_copy = {**published, "anchor_grid": torch.full((3, 1, 3, 1, 1, 2), 7.0)}
    for state in (published, with_copy)[: 1 if "anchor_grid" in published else 2]:
        head.load_state_dict(state)  # strict
        assert all((value == 7).all() for value in head.state_dict().values())
        assert len(state) == len(case.meta["keys"]) + (state is with_copy)
    assert ("anchor_grid" in head.state_dict()) == name.startswith("v7_I")
