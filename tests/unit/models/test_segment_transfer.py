"""Weights between detection and segmentation, attention in segmentation networks, and their rows."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from models.build import build_model as build
from models.spec.parser import load_spec
from models.spec.planning import plan_layers
from models.transfer.report import KEPT
from models.transfer.transfer import Source, transfer
from tests.foreign_models import randomize_
from utils.errors import UserError

PAIRS = [("yolov8n", "yolov8n-seg"), ("yolo11n", "yolo11n-seg"), ("yolo26n", "yolo26n-seg"), ("yolov5n", "yolov5n-seg")]


def moved(source: str, target: str) -> tuple[torch.nn.Module, torch.nn.Module, object]:
    old = randomize_(build_model(f"{source}.yaml", nc=2, names=("a", "b")))
    new = build_model(f"{target}.yaml", nc=2, names=("a", "b"))
    return old, new, transfer(new, Source(old.state_dict(), old.spec.to_dict(), old.names))


@pytest.mark.parametrize(("detect", "segment"), PAIRS)
def test_detection_weights_fill_all_of_a_segmentation_network_but_its_masks(detect, segment):
    old, new, report = moved(detect, segment)
    assert report.of_source == 1, str(report)
    before, after = old.state_dict(), new.state_dict()
    head = f"model.{len(new.plans) - 1}."
    for key, value in before.items():
        if not (key.startswith(f"{head}m.") or key.endswith("num_batches_tracked")):
            assert torch.equal(after[key], value), key
    rows = [row for row in report.rows if row.target == len(new.plans) - 1]
    assert rows[0].outcome != KEPT
    assert "Segment" in str(report), "the report names the head's row as filled in part"


def test_outputs_of_an_anchor_move_by_what_they_mean():
    """YOLOv5's outputs of an anchor are box, objectness, classes and, in segmentation, mask coefficients behind them."""
    old, new, _ = moved("yolov5n", "yolov5n-seg")
    mine, theirs = (m.state_dict()["model.24.m.0.bias"].view(3, -1) for m in (new, old))
    assert (mine.shape[1], theirs.shape[1]) == (39, 7)
    assert torch.equal(mine[:, :7], theirs)
    back, again, report = moved("yolov5n-seg", "yolov5n")
    assert torch.equal(
        again.state_dict()["model.24.m.1.weight"], back.state_dict()["model.24.m.1.weight"].unflatten(0, (3, -1))[:, :7].flatten(0, 1)
    )
    assert report.of_target == 1
    same, copied, _ = moved("yolov5n-seg", "yolov5n-seg")
    assert torch.equal(copied.state_dict()["model.24.m.2.bias"], same.state_dict()["model.24.m.2.bias"])


@pytest.mark.parametrize("name", ["yolov8n-seg", "yolov5n-seg", "yolo26n-seg"])
@torch.no_grad()
def test_inserted_attention_keeps_the_predictions_at_first(name):
    plain = randomize_(build_model(f"{name}.yaml", nc=2)).eval()
    model = build(f"{name}.yaml", nc=2, attention=["EMA@detect"], attention_init="identity").eval()
    assert sum(plan.name == "EMA" for plan in model.plans) == 3
    assert transfer(model, Source(plain.state_dict(), plain.spec.to_dict(), plain.names)).of_source == 1
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    found, wanted = model.predict(images), plain.predict(images)
    assert torch.allclose(found.fields["coefficients"], wanted.fields["coefficients"], atol=1e-4)
    assert torch.allclose(found.shared["prototypes"], wanted.shared["prototypes"], atol=1e-4)


def test_attention_before_the_head_of_the_dual_form_leaves_the_prototypes_map():
    with torch.device("meta"):
        model = build("yolov9-c-dseg.yaml", nc=2, attention=["SimAM@detect"])
    assert [plan.name for plan in model.plans].count("SimAM") == 3
    assert model.plans[model.plans[-1].sources[-1]].name == "Conv"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (["nc", 32, 256, 1, 2], "expects nc, then anchors"),
        (["nc", "x"], "expects nc"),
        (["nc", 0, 256], "expects nc"),
        (["nc", 999, 256], "masks 999"),
    ],
)
def test_a_wrong_row_says_what_it_expects(row, says):
    data = {"nc": 2, "scales": {"n": [1, 1, 64]}, "backbone": [[-1, 1, "Conv", [16, 3, 8]]], "head": [[[-1], 1, "Segment", row]]}
    with pytest.raises(UserError, match=says):
        build_model(data)


def test_the_width_before_the_prototypes_is_scaled():
    for scale, width in (("n", 64), ("m", 192), ("x", 320)):
        assert plan_layers(load_spec(f"yolov8{scale}-seg.yaml"))[-1].kwargs == {"masks": 32, "hidden": width}
