"""Segmentation heads and networks against the published ones: names, raw maps, coefficients and prototypes, and the deployed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import build_model
from models.heads.base import Head, HeadOutput
from models.heads.segment import LightEndToEndSegment, LightSegment, Segment
from models.losses.segment import COEFFICIENTS, PROTOTYPES, SEMANTIC
from tests import golden
from utils.boxes import cxcywh_to_xyxy

HEADS = {"v8_Segment": Segment, "v11_Segment": LightSegment, "v26_Segment": LightEndToEndSegment}
CASES = [n for n in golden.all_names("heads") if n.rsplit("_nc", 1)[0] in HEADS]
NETWORKS = [n for n in golden.all_names("models") if n.endswith(("-seg", "-dseg")) and not n.startswith("train_")]
NETWORKS = [n for n in NETWORKS if golden.find("models", n).arrays]
BRANCHES = (("one2many", "one2one"), ("aux", "main"))


def built(case: golden.Golden, name: str) -> Head:
    args = case.meta["args"]
    options = {"reg_max": args["reg_max"]} if "reg_max" in args else {}
    head = HEADS[name.rsplit("_nc", 1)[0]](args["nc"], args["ch"], masks=args["nm"], hidden=args["npr"], **options)
    head.set_strides(args["stride"])
    return golden.fill_(head).eval()


def key(*parts: str) -> str:
    return "_".join(filter(None, parts))


def coefficients(output: HeadOutput, branch: int) -> Tensor:
    return torch.cat([m.flatten(2) for m in output.fields[branch][COEFFICIENTS]], dim=2)


@pytest.mark.parametrize("name", golden.cases("heads", CASES, "names"))
def test_parameter_names_shapes_and_order_match(name):
    case = golden.find("heads", name)
    assert [[k, list(v.shape)] for k, v in built(case, name).state_dict().items()] == case.meta["keys"]


@pytest.mark.parametrize("name", golden.cases("heads", CASES))
@torch.no_grad()
def test_raw_maps_coefficients_and_prototypes_match(name):
    case = golden.find("heads", name)
    head, features = built(case, name), [case.tensor(f"input_{i}") for i in range(3)]
    output = head(features)
    branches = BRANCHES[0] if "raw_one2many_0" in case.arrays else ("",)
    for number, (branch, maps) in enumerate(zip(branches, output.branches, strict=True)):
        for level, raw in enumerate(maps):
            golden.assert_close(raw, case.tensor(key("raw", branch, str(level))), 1e-5, f"{branch} {level}")
        golden.assert_close(coefficients(output, number), case.tensor(key("mask_coefficient", branch)), 1e-5, "coefficients")
    golden.assert_close(output.shared[PROTOTYPES], case.tensor("proto"), 1e-5, "prototypes")
    check_predictions(head, output, case.tensor(key("decoded", branches[-1])), case.tensor("proto"), corners=len(branches) > 1)
    if "semantic" in case.arrays:
        golden.assert_close(head.proto.with_semantic(features)[1], case.tensor("semantic"), 1e-5, "semantic map")
        assert SEMANTIC not in output.shared, "the map of the classes is computed in training only"
        lean = head.deploy_for_suppression().head
        assert not any("semseg" in k for k in lean.state_dict())
        check_predictions(lean, lean(features), case.tensor("decoded_one2many"), case.tensor("proto"))


def check_predictions(head: Head, output: HeadOutput, decoded: Tensor, prototypes: Tensor, *, corners: bool = False) -> None:
    predictions, decoded = head.decode(output), decoded.transpose(1, 2)  # (B, N, 4 + nc + masks)
    nc = predictions.scores.shape[2]
    boxes = decoded[..., :4] if corners else cxcywh_to_xyxy(decoded[..., :4])
    golden.assert_close(predictions.boxes, boxes, 1e-4, "boxes")
    golden.assert_close(predictions.scores, decoded[..., 4 : 4 + nc], 1e-4, "scores")
    golden.assert_close(predictions.fields[COEFFICIENTS], decoded[..., 4 + nc :], 1e-4, "coefficients")
    golden.assert_close(predictions.shared[PROTOTYPES], prototypes, 1e-4, "prototypes")


@pytest.mark.parametrize("name", golden.cases("models", NETWORKS))
@torch.no_grad()
def test_coefficients_and_prototypes_of_networks_match(name):
    case = golden.find("models", name)
    model = golden.fill_(build_model(case.meta["config"], nc=case.meta["nc"]).eval(), case.meta["fill_g"])
    images = golden.image_array(0, (1, 3, 128, 160))
    main = next((b[-1] for b in BRANCHES if f"decoded_{b[-1]}" in case.arrays), "")
    prototypes = case.tensor("proto" if main in ("", "one2one") else f"proto_{main}")
    for net in (model, model.deploy()):
        output = net(images)
        if "raw_0" in case.arrays and case.tensor("raw_0").dim() == 5:  # with anchors the coefficients are in the raw maps
            for level, raw in enumerate(output.main):
                wanted = case.tensor(f"raw_{level}").permute(0, 1, 4, 2, 3).flatten(1, 2)
                golden.assert_close(raw, wanted, 1e-5, f"level {level}")
            golden.assert_close(net.predict(images).shared[PROTOTYPES], prototypes, 1e-4, "prototypes")
            found = net.predict(images)
            assert found.fields[COEFFICIENTS].shape == (1, found.scores.shape[1], case.meta["nm"])
        else:
            check_predictions(net.head, output, case.tensor(key("decoded", main)), prototypes, corners=main == "one2one")


@torch.no_grad()
def test_the_dual_form_deploys_to_one_branch():
    """yolov9-c-dseg becomes a network of gelan-c-dseg's rows (with two blocks more before its prototypes), and predicts the same."""
    model = golden.fill_(build_model("yolov9-c-dseg.yaml", nc=2).eval(), 1.35)
    lean = model.deploy(fuse=False)
    assert [p.name for p in lean.plans] == [p.name for p in build_model("gelan-c-dseg.yaml", nc=2).plans]
    images = golden.image_array(0, (1, 3, 64, 96))
    before, after = model.predict(images), lean.predict(images)
    assert torch.equal(before.boxes, after.boxes)
    assert torch.equal(before.fields[COEFFICIENTS], after.fields[COEFFICIENTS])
    assert torch.equal(before.shared[PROTOTYPES], after.shared[PROTOTYPES])
    again = build_model(lean.spec.to_dict())
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in lean.state_dict().items()}
