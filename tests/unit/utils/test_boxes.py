"""Box formats, clipping, overlaps and the way back to the original image."""

from __future__ import annotations

import pytest
import torch

from utils.boxes import (
    box_area,
    box_ioa,
    box_iou,
    clip_boxes,
    cxcywh_to_xyxy,
    denormalised,
    ltwh_to_xyxy,
    normalised,
    size_iou,
    to_original,
    xyxy_to_cxcywh,
    xyxy_to_ltwh,
)
from utils.types import Letterbox

BOXES = torch.tensor([[10.0, 20.0, 50.0, 100.0], [0.0, 0.0, 8.0, 4.0]])
LETTERBOX = Letterbox(
    original_hw=torch.tensor([[100, 200], [50, 40]]),
    scale_xy=torch.tensor([[0.5, 0.5], [2.0, 1.5]]),
    pad_xy=torch.tensor([[0.0, 14.0], [24.0, 2.0]]),
)


def test_box_formats_convert() -> None:
    torch.testing.assert_close(xyxy_to_cxcywh(BOXES), torch.tensor([[30.0, 60.0, 40.0, 80.0], [4.0, 2.0, 8.0, 4.0]]))
    torch.testing.assert_close(xyxy_to_ltwh(BOXES), torch.tensor([[10.0, 20.0, 40.0, 80.0], [0.0, 0.0, 8.0, 4.0]]))


@pytest.mark.parametrize("shape", [(0, 4), (5, 4), (2, 3, 4), (2, 0, 4)])
def test_formats_round_trip(shape: tuple[int, ...]) -> None:
    boxes = torch.rand(shape).sort(dim=-1).values * 100
    for there, back in ((xyxy_to_cxcywh, cxcywh_to_xyxy), (xyxy_to_ltwh, ltwh_to_xyxy)):
        torch.testing.assert_close(back(there(boxes)), boxes)
    torch.testing.assert_close(denormalised(normalised(boxes, (480, 640)), (480, 640)), boxes)


def test_clip_takes_one_size_or_one_each() -> None:
    boxes = torch.tensor([[-5.0, -6.0, 900.0, 700.0]]).repeat(2, 1)
    assert clip_boxes(boxes, (480, 640)).tolist() == [[0, 0, 640, 480]] * 2
    assert clip_boxes(boxes, torch.tensor([[480, 640], [10, 20]])).tolist() == [[0, 0, 640, 480], [0, 0, 20, 10]]


def test_to_original_undoes_the_letterbox_of_every_image() -> None:
    original = torch.tensor([[10.0, 20.0, 150.0, 90.0], [1.0, 2.0, 30.0, 40.0], [0.0, 0.0, 200.0, 100.0]])
    image = torch.tensor([0, 1, 0])
    in_batch = original * LETTERBOX.scale_xy[image].repeat(1, 2) + LETTERBOX.pad_xy[image].repeat(1, 2)
    torch.testing.assert_close(to_original(in_batch, LETTERBOX, image=image), original)


def test_to_original_clips_only_when_asked() -> None:
    box, image = torch.tensor([[-50.0, 0.0, 500.0, 500.0]]), torch.tensor([0])
    assert to_original(box, LETTERBOX, image=image).tolist() == [[0, 0, 200, 100]]
    assert to_original(box, LETTERBOX, image=image, clip=False).tolist() == [[-100, -28, 1000, 972]]


def test_iou_matches_hand_computed_values() -> None:
    a = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    b = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0], [20.0, 20.0, 30.0, 30.0], [10.0, 0.0, 20.0, 10.0]])
    torch.testing.assert_close(box_iou(a, b), torch.tensor([[1.0, 1 / 3, 0.0, 0.0]]))
    torch.testing.assert_close(box_ioa(b[1:2] * 2, a), torch.tensor([[0.0]]))
    torch.testing.assert_close(size_iou(torch.tensor([[10.0, 10.0]]), torch.tensor([[5.0, 20.0]])), torch.tensor([[50 / 150]]))


def test_inverted_box_has_no_area() -> None:
    box = torch.tensor([[10.0, 10.0, 5.0, 5.0]])
    assert box_area(box).item() == 0
    assert box_iou(box, box).item() == 0


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (3, 0)])
def test_empty_boxes_are_supported(n: int, m: int) -> None:
    assert box_iou(torch.zeros(n, 4), torch.zeros(m, 4)).shape == (n, m)
    assert box_ioa(torch.zeros(n, 4), torch.zeros(m, 4)).shape == (n, m)
    empty = torch.zeros(0, 4)
    assert to_original(empty, LETTERBOX, image=torch.zeros(0, dtype=torch.long)).shape == (0, 4)
    assert clip_boxes(empty, (3, 4)).shape == (0, 4)
