"""The IoU family against published values and gradients."""

from __future__ import annotations

import pytest
import torch

from models.losses.box import WISE_ALPHA, WISE_DELTA, BoxLoss, wise_focus
from tests import golden
from utils.boxes import cxcywh_to_xyxy
from utils.iou import SIMILARITIES

CASES = [(name, variant) for name in golden.all_names("ops", "bbox_iou_") for variant in golden.find("ops", name).meta["args"]["variants"]]


def test_golden_cases_exist():
    assert CASES


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_iou_values_and_gradients_match_the_reference(name, variant):
    case = golden.find("ops", name)
    kind = variant.split("_")[0] if not variant.startswith("alpha") else variant.split("_")[1]
    options = {"alpha": float(variant[5])} if variant.startswith("alpha") else {}
    if variant == "MDPIoU_480x320":
        options["image_hw"] = (480.0, 320.0)
    boxes = [case.tensor(k).requires_grad_() for k in ("box1", "box2")]
    corners = [cxcywh_to_xyxy(b) if case.meta["args"]["format"] == "xywh" else b for b in boxes]
    value = SIMILARITIES[kind](*corners, **options)
    golden.assert_close(value, case.tensor(variant), 1e-4, variant)
    value.sum().backward()
    clear = ~shared_edges(*(c.detach() for c in corners))
    assert clear.sum() >= 30
    for i, b in enumerate(boxes, start=1):
        golden.assert_close(b.grad[clear], case.tensor(f"{variant}_grad{i}")[clear], 1e-4, f"gradient {i} of {variant}")


def shared_edges(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pairs with an edge in common, up to rounding: the gradient of min and max is a convention there."""
    differences = (a[:, [0, 1, 2, 3, 0, 1]] - b[:, [0, 1, 2, 3, 2, 3]]).abs()
    return ((differences < 1e-4) | ((a[:, [0, 1, 2, 3, 2, 3]] - b[:, [0, 1, 2, 3, 0, 1]]).abs() < 1e-4)).any(dim=1)


def test_wise_iou_focus_matches_the_reference():
    case = golden.find("ops", "wiou_scale_v9")
    args = case.meta["args"]
    assert (args["gamma"], args["delta"]) == (WISE_ALPHA, WISE_DELTA)
    for version in ("v1", "v2", "v3"):
        for losses, mean, scale in zip(*(case.tensor(k) for k in ("iou_loss", f"{version}_mean", f"{version}_scale"))):
            golden.assert_close(wise_focus(losses / mean.float(), f"WIoU-{version}"), scale, 1e-5, version)


def test_wise_iou_running_mean_matches_the_reference():
    case = golden.find("ops", "wiou_scale_v9")
    loss = BoxLoss("WIoU-v3")
    from models.losses import box as module

    for losses, mean in zip(case.tensor("iou_loss"), case.tensor("v3_mean")):
        true = torch.tensor([0.0, 0.0, 1.0, 100.0]).expand(len(losses), 4)
        predicted = true.clone()
        predicted[:, 3] = 100 * (1 - losses)  # IoU = 1 - loss
        predicted.requires_grad_()
        counted = losses <= 1
        loss(predicted, true, mask=counted, image_hw=(1.0, 1.0))
        if counted.all():
            momentum, wanted = case.meta["args"]["momentum"], float(mean)
            assert abs(float(loss.mean) - wanted) < 2 * abs(module.WISE_MOMENTUM - momentum) + 1e-6
