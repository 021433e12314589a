"""Heads and loss of oriented boxes: rows, what they refuse, what other networks' weights give them, and that the loss finds boxes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models import build_model
from models.heads.base import HeadOutput
from models.heads.rotated import (
    EndToEndRotatedDetect,
    LightEndToEndRotatedDetect,
    LightRotatedDetect,
    PlainAngleDetect,
    PlainAngleEndToEndDetect,
    RotatedDetect,
)
from models.transfer.transfer import Source, transfer
from tasks import OBB
from tests.golden import fill_
from utils.config import Hyperparameters
from utils.errors import UserError
from utils.rotated.boxes import rotated_boxes
from utils.rotated.overlap import rotated_iou
from utils.types import Batch, Letterbox, Targets

ROWS = [
    [-1, 1, "Conv", [8, 3, 2]],
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "{block}", [16]],
    [-1, 1, "Conv", [32, 3, 2]],
]
FORMS = {
    ("OBB", "Conv", False): RotatedDetect,
    ("OBB", "C3k2", False): LightRotatedDetect,
    ("OBB26", "C3k2", False): PlainAngleDetect,
    ("OBB", "Conv", True): EndToEndRotatedDetect,
    ("OBB", "C3k2", True): LightEndToEndRotatedDetect,
    ("OBB26", "C3k2", True): PlainAngleEndToEndDetect,
}


def cfg(head: str = "OBB", block: str = "Conv", args: tuple = ("nc", 1), **keys) -> dict:
    rows = [[source, number, block if "{" in name else name, values] for source, number, name, values in ROWS]
    scales = {"n": [1.0, 1.0, 1024]}
    return {"nc": 3, "scales": scales, **keys, "backbone": rows, "head": [[[3, 4], 1, head, list(args)]]}


@pytest.mark.parametrize(("head", "block", "end2end"), FORMS)
def test_a_row_means_the_form_that_its_file_says(head, block, end2end):
    model = build_model(cfg(head, block, **({"end2end": True} if end2end else {})))
    assert type(model.head) is FORMS[head, block, end2end]
    assert model.task is OBB
    predictions = model.eval().predict(torch.rand(1, 3, 64, 96))
    assert predictions.fields["angle"].shape == (*predictions.scores.shape[:2], 1)
    assert predictions.unique is end2end
    lean = model.deploy()
    assert lean.head.branch_weights == (1.0,)
    torch.testing.assert_close(lean.predict(torch.zeros(1, 3, 64, 64)).fields, model.predict(torch.zeros(1, 3, 64, 64)).fields)


def test_a_head_of_several_angles_is_refused():
    with pytest.raises(UserError, match="2 angles: a rotated box has one"):
        build_model(cfg(args=("nc", 2)))


@pytest.mark.parametrize("name", ["yolov8s-obb", "yolo11m-obb", "yolo26n-obb", "yolov8n-obb-BiFormer", "yolo11n-obb-CloAttention"])
def test_configs_are_found_by_their_bare_names(name):
    with torch.device("meta"):
        assert build_model(f"{name}.yaml", nc=15).task is OBB


@pytest.mark.parametrize("name", ["WIoU-v3", "SIoU", "NWD"])
def test_a_loss_of_axis_aligned_boxes_is_refused(name):
    with pytest.raises(UserError, match=f"iou_loss {name}: rotated boxes are compared by ProbIoU"):
        build_model(cfg()).head.build_loss(Hyperparameters(iou_loss=name))


@pytest.mark.parametrize(("old", "new", "angles"), [("Detect", "OBB", "angle"), ("OBB", "Detect", "")])
def test_weights_move_between_detection_and_oriented_boxes(old, new, angles):
    before = fill_(build_model(cfg(old, args=("nc",))))
    after = build_model(cfg(new, args=("nc",)))
    report = transfer(after, Source(before.state_dict(), before.spec.to_dict(), before.names, "old.pt"))
    state = after.state_dict()
    common = before.state_dict().keys() & state.keys()
    assert any("cv2" in key for key in common)
    assert all(torch.equal(state[key], before.state_dict()[key]) for key in common)
    assert common <= report.filled
    assert {key for key in state if ".cv4." in key}.isdisjoint(report.filled)


def scene(targets: Tensor, *, side: int = 64) -> Batch:
    """One image with boxes (n, 5) in px and angle."""
    n = len(targets)
    objects = Targets(torch.zeros(n).long(), torch.arange(n) % 3, targets[:, :4] / side, angle=targets[:, 4])
    letterbox = Letterbox(torch.tensor([[side, side]]), torch.ones(1, 2), torch.zeros(1, 2))
    return Batch(torch.zeros(1, 3, side, side), objects, ("",), letterbox, n)


@pytest.mark.parametrize("head", ["OBB", "OBB26"])
def test_the_loss_alone_finds_rotated_boxes(head):
    """Maps that are free to take any value end at the boxes, angles included: loss, assignment and decoding mean the same box."""
    torch.manual_seed(0)
    end2end = {"end2end": True, "reg_max": 1} if head == "OBB26" else {}
    model = build_model(cfg(head, "C3k2" if end2end else "Conv", **end2end))
    targets = torch.tensor(((20.0, 22, 30, 8, 0.6), (44, 40, 28, 10, 2.0), (20, 50, 12, 12, 0.3)))
    batch, loss = scene(targets), model.head.build_loss(Hyperparameters())
    with torch.no_grad():
        start = model.train()(torch.rand(1, 3, 64, 64))
    branches = [[level.clone().requires_grad_() for level in maps] for maps in start.branches]
    angles = [[level.clone().requires_grad_() for level in fields["angle"]] for fields in start.fields]
    optimizer = torch.optim.Adam([leaf for maps in (*branches, *angles) for leaf in maps], lr=0.05)
    for _ in range(250):
        output = HeadOutput(tuple(map(tuple, branches)), fields=tuple({"angle": tuple(levels)} for levels in angles))
        optimizer.zero_grad()
        sum(loss(output, batch).values()).backward()
        optimizer.step()
    found = model.head.decode(output)
    boxes = rotated_boxes(found.boxes, found.fields["angle"])[0].detach()
    for number, target in enumerate(targets):
        best = int(found.scores[0, :, number % 3].argmax())
        assert rotated_iou(boxes[best], target) > 0.8
        difference = (boxes[best, 4] - target[4]) % (math.pi / 2)
        assert min(difference, math.pi / 2 - difference) < 0.1


def test_an_image_without_boxes_and_boxes_of_a_pixel_have_a_finite_loss():
    model = build_model(cfg())
    output = model.train()(torch.rand(1, 3, 64, 64))
    for boxes in (torch.zeros(0, 5), torch.tensor(((20.0, 20, 1, 30, 0.2), (30, 30, 0, 0, 0.0)))):
        parts = model.head.build_loss(Hyperparameters())(output, scene(boxes))
        assert all(torch.isfinite(value) for value in parts.values())
        assert parts["box"] == parts["angle"] == 0, "sides below 2 px are not learned"


def test_targets_of_another_task_are_named():
    model = build_model(cfg())
    batch = scene(torch.tensor(((20.0, 22, 30, 8, 0.6),)))
    with pytest.raises(TypeError, match="targets of rotated boxes have an angle"):
        model.head.build_loss(Hyperparameters())(
            model.train()(torch.rand(1, 3, 64, 64)), batch._replace(targets=batch.targets.replace(angle=None))
        )
