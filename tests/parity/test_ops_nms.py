"""Non-maximum suppression against published code: the same boxes, in the same order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.golden import Golden, find
from utils.boxes import cxcywh_to_xyxy
from utils.nms import Suppression, non_max_suppression
from utils.types import Predictions

NAMES = ("nms_v5", "nms_v9", "nms_ultralytics")


def predictions_of(g: Golden) -> Predictions:
    raw = g.tensor("prediction")
    if g.meta["args"]["layout"].startswith("(b, n"):  # with objectness
        return Predictions(cxcywh_to_xyxy(raw[..., :4]), raw[..., 4:5] * raw[..., 5:])
    raw = raw.transpose(1, 2)
    return Predictions(cxcywh_to_xyxy(raw[..., :4]), raw[..., 4:])


def options(settings: dict) -> dict:
    names = {"conf_thres": "conf", "iou_thres": "iou"}
    return {names.get(k, k): v for k, v in settings.items()}


@pytest.mark.parametrize("name", NAMES)
def test_nms_keeps_the_reference_boxes_in_the_reference_order(name: str) -> None:
    g = find("ops", name)
    predictions = predictions_of(g)
    for setting, values in g.meta["args"]["settings"].items():
        for image, found in enumerate(non_max_suppression(predictions, Suppression(**options(values)))):
            expected: Tensor = g.tensor(f"{setting}_img{image}")
            assert len(found.boxes) == len(expected), (setting, image)
            assert torch.equal(found.classes, expected[:, 5].long()), (setting, image)
            torch.testing.assert_close(found.boxes, expected[:, :4], rtol=1e-6, atol=1e-4)
            torch.testing.assert_close(found.scores, expected[:, 4], rtol=1e-6, atol=1e-6)
