"""Heads with a one-to-many and a one-to-one branch against the published ones, and what is kept of them without suppression."""

from __future__ import annotations

import pytest
import torch

from models.heads.anchor_free import LightDetect
from models.heads.base import Head
from models.heads.end_to_end import LightEndToEndDetect
from tasks import DETECT
from tests import golden
from utils.boxes import cxcywh_to_xyxy
from utils.nms import Suppression

CASES = [n for n in golden.all_names("heads") if n.startswith(("v10_Detect", "v26_Detect"))]
LIGHT = [n for n in golden.all_names("heads") if n.startswith("v11_Segment")]  # boxes and classes are those of YOLO11's detection head
SELECTIONS = {"end2end": {}, "end2end_agnostic": {"agnostic": True}, "end2end_max20": {"max_det": 20}}


def built(case: golden.Golden, cls: type[Head]) -> Head:
    args = case.meta["args"]
    head = cls(args["nc"], args["ch"], **({"reg_max": args["reg_max"]} if "reg_max" in args else {}))
    head.set_strides(args["stride"])
    return golden.fill_(head).eval()


def features(case: golden.Golden) -> list[torch.Tensor]:
    return [case.tensor(f"input_{i}") for i in range(len(case.meta["args"]["ch"]))]


@pytest.mark.parametrize("name", golden.cases("heads", CASES, "names"))
def test_parameter_names_shapes_and_order_match(name):
    case = golden.find("heads", name)
    assert [[k, list(v.shape)] for k, v in built(case, LightEndToEndDetect).state_dict().items()] == case.meta["keys"]


@pytest.mark.parametrize("name", golden.cases("heads", CASES))
@torch.no_grad()
def test_raw_maps_and_predictions_of_both_branches_match(name):
    case = golden.find("heads", name)
    head = built(case, LightEndToEndDetect)
    output = head(features(case))
    for branch, maps in zip(("one2many", "one2one"), output.branches, strict=True):
        for level, raw in enumerate(maps):
            golden.assert_close(raw, case.tensor(f"raw_{branch}_{level}"), 1e-5, f"{branch} {level}")
    one = case.tensor("decoded_one2one").transpose(1, 2)  # (B, N, 4 + nc), xyxy
    many = case.tensor("decoded_one2many").transpose(1, 2)  # cxcywh
    for lean, boxes, scores, unique in (
        (head, one[..., :4], one[..., 4:], True),
        (head.deploy().head, one[..., :4], one[..., 4:], True),
        (head.deploy_for_suppression().head, cxcywh_to_xyxy(many[..., :4]), many[..., 4:], False),
    ):
        predictions = lean.decode(lean(features(case)))
        assert predictions.unique is unique
        golden.assert_close(predictions.boxes, boxes, 1e-4, "boxes")
        golden.assert_close(predictions.scores, scores, 1e-4, "scores")


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", golden.cases("heads", CASES))
@torch.no_grad()
def test_the_best_without_suppression_are_those_of_the_published_selection(name, selection):
    case = golden.find("heads", name)
    head = built(case, LightEndToEndDetect)
    wanted = case.tensor(selection)[0]  # (K, 6) xyxy, score, class
    (found,) = DETECT.postprocess(head.decode(head(features(case))), Suppression(conf=-1.0, **SELECTIONS[selection]))
    golden.assert_close(found.scores, wanted[:, 4], 1e-5, "scores")
    gap = (wanted[1:, 4] - wanted[:-1, 4]).abs() > 2e-6
    stable = torch.cat((gap, gap.new_ones(1))) & torch.cat((gap.new_ones(1), gap))  # ties may swap
    assert stable.float().mean() > 0.5
    golden.assert_close(found.boxes[stable], wanted[stable, :4], 1e-4, "boxes")
    assert torch.equal(found.classes[stable], wanted[stable, 5].long())


@pytest.mark.parametrize("name", LIGHT)
@torch.no_grad()
def test_light_class_convolutions_give_the_published_maps(name):
    case = golden.find("heads", name)
    head = built(case, LightDetect)
    keys = [[k, list(v.shape)] for k, v in head.state_dict().items()]
    assert keys == [k for k in case.meta["keys"] if k[0].startswith(("cv2.", "cv3.", "dfl."))]
    for level, raw in enumerate(head(features(case)).main):
        golden.assert_close(raw, case.tensor(f"raw_{level}"), 1e-5, f"level {level}")
