"""Whole anchor-based networks: outputs of filled models, and what deploying YOLOv7's heads leaves."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from tests import golden
from utils.boxes import cxcywh_to_xyxy

LARGE = 10_000_000  # parameters


def cases() -> list[str]:
    found = []
    for name in golden.all_names("models", "yolov5") + golden.all_names("models", "yolov7"):
        case = golden.find("models", name)
        if "decoded" in case.arrays and case.arrays["decoded"].shape[-1] == case.meta["nc"] + 5:
            found.append(name)
    return found


def large(name: str) -> bool:
    return golden.find("models", name).meta["params"] > LARGE


@pytest.mark.parametrize("name", golden.cases("models", cases(), slow=filter(large, cases())))
@torch.no_grad()
def test_outputs_match_the_published_network(name):
    case = golden.find("models", name)
    model = golden.fill_(build_model(case.meta["config"], nc=case.meta["nc"]).eval(), case.meta["fill_g"])
    images = golden.image_array(0, (1, 3, 128, 160))
    decoded = case.tensor("decoded")
    for net in (model, model.fuse(), model.deploy()):
        output = net(images)
        for level, raw in enumerate(output.main):
            golden.assert_close(raw, case.tensor(f"raw_{level}").permute(0, 1, 4, 2, 3).flatten(1, 2), 2e-5, f"raw {level}")
        boxes, scores = net.head.decode(output)
        golden.assert_close(boxes, cxcywh_to_xyxy(decoded[..., :4]), 1e-4, "boxes")
        golden.assert_close(scores, decoded[..., 4:5] * decoded[..., 5:], 1e-4, "scores")


@pytest.mark.parametrize("name", ["yolov7-tiny", *(pytest.param(n, marks=pytest.mark.slow) for n in ("yolov7", "yolov7x", "yolov7-w6"))])
def test_deploying_gives_the_published_deploy_network(name):
    """Key for key the published deploy config after fusing (for tiny, which has none, the plain head in its place)."""
    lean = build_model(f"{name}.yaml").deploy()
    shapes = [(k, v.shape) for k, v in lean.state_dict().items()]
    assert shapes == [(k, v.shape) for k, v in build_model(f"{name}-deploy.yaml").fuse().state_dict().items()]
    assert lean.plans[-1].name == "Detect"
    assert len(lean.plans[-1].sources) == len(lean.strides)


@torch.no_grad()
def test_one_class_scores_by_objectness_before_and_after_deploying():
    model = golden.fill_(build_model("yolov7-tiny.yaml", nc=1).eval(), 1.35)
    images = golden.image_array(0, (1, 3, 64, 64))
    objectness = torch.cat([m.unflatten(1, (-1, 6))[:, :, 4].flatten(1) for m in model(images).main], dim=1).sigmoid()
    for net, tolerance in ((model, 1e-7), (model.deploy(), 1e-4)):
        golden.assert_close(net.predict(images).scores[..., 0], objectness, tolerance)
