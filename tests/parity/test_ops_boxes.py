"""Boxes and their overlaps against published code."""

from __future__ import annotations

import pytest
import torch

from tests.golden import assert_close, find
from utils.boxes import (
    box_ioa,
    box_iou,
    clip_boxes,
    cxcywh_to_xyxy,
    denormalised,
    normalised,
    size_iou,
    to_original,
    xyxy_to_cxcywh,
)
from utils.types import Letterbox

TOL = 1e-6


def test_box_formats_match_the_reference() -> None:
    g = find("ops", "boxes_v9")
    assert_close(cxcywh_to_xyxy(g.tensor("xywh")), g.tensor("xyxy"), TOL)
    assert_close(xyxy_to_cxcywh(g.tensor("xyxy")), g.tensor("back"), TOL)


def test_normalised_boxes_round_trip() -> None:
    g = find("ops", "boxes_v9")
    hw = (320, 416)
    padded = cxcywh_to_xyxy(denormalised(g.tensor("norm"), hw)) + torch.tensor([7.0, 11.0, 7.0, 11.0])
    assert_close(padded, g.tensor("norm_to_px_416x320_pad"), TOL)
    assert_close(xyxy_to_cxcywh(normalised(g.tensor("xyxy"), hw)), g.tensor("px_to_norm_416x320"), TOL)
    inside = clip_boxes(g.tensor("xyxy"), (320 - 1e-3, 416 - 1e-3))
    assert_close(xyxy_to_cxcywh(normalised(inside, hw)), g.tensor("px_to_norm_clip"), TOL)


@pytest.mark.parametrize("case", range(5))
def test_boxes_map_back_to_the_original_image(case: int) -> None:
    g = find("ops", "boxes_v9")
    height, width, height0, width0, gain, pad_x, pad_y = g.arrays[f"scaled_{case}_args"].tolist()
    if gain < 0:
        gain = min(height / height0, width / width0)
        pad_x, pad_y = (width - width0 * gain) / 2, (height - height0 * gain) / 2
    letterbox = Letterbox(torch.tensor([[int(height0), int(width0)]]), torch.full((1, 2), gain), torch.tensor([[pad_x, pad_y]]))
    boxes = g.tensor("xyxy")
    found = to_original(boxes, letterbox, image=torch.zeros(len(boxes), dtype=torch.long))
    assert_close(found, g.tensor(f"scaled_{case}"), 1e-5)


def test_iou_matrices_match_the_reference() -> None:
    g = find("ops", "box_iou_matrix_v9")
    box1, box2 = g.tensor("box1"), g.tensor("box2")
    assert_close(box_iou(box1, box2), g.tensor("iou"), TOL)
    assert_close(box_ioa(box1[:9], box2), g.tensor("ioa"), TOL)
    assert_close(size_iou(box1[:, 2:] - box1[:, :2], box2[:, 2:] - box2[:, :2]), g.tensor("wh_iou"), TOL)
