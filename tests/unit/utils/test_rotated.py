"""Rotated boxes: exact overlap against a drawn one, suppression by both rules, rectangles of polygons, the way between images."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from utils.nms import Suppression
from utils.rotated.boxes import corners_of, extents, regularised, rescaled, rotated_boxes, unrotated
from utils.rotated.overlap import rotated_intersection, rotated_iou_matrix
from utils.rotated.polygons import canonical, ordered_corners, rectangles_of_polygons
from utils.rotated.suppression import POLYGON, PROBIOU, suppress_rotated
from utils.types import Detections

QUARTER = math.pi / 4


def random_boxes(count: int, *, seed: int = 0, size: float = 60.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 5, generator=draw, dtype=torch.float64)
    return torch.cat((values[:, :2] * size, 4 + values[:, 2:4] * size / 2, values[:, 4:] * 6 - 3), dim=1)


def clipped_area(one: np.ndarray, other: np.ndarray) -> float:
    """Common area of two convex polygons, by OpenCV."""
    return cv2.intersectConvexConvex(one.astype(np.float32), other.astype(np.float32))[0]


def test_exact_overlap_is_that_of_the_polygons():
    one, other = random_boxes(80), random_boxes(80, seed=1)
    expected = [clipped_area(a, b) for a, b in zip(corners_of(one).numpy(), corners_of(other).numpy())]
    found = rotated_intersection(one, other)
    assert (found > 0).sum() > 20
    np.testing.assert_allclose(found, expected, atol=0.05)
    torch.testing.assert_close(found, rotated_intersection(other, one))


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        ((10, 10, 4, 6, 0.3), (10, 10, 4, 6, 0.3), 24.0),  # the same
        ((10, 10, 4, 6, 0.3), (10, 10, 6, 4, 0.3 + math.pi / 2), 24.0),  # the same, written otherwise
        ((10, 10, 4, 4, 0.0), (12, 10, 4, 4, 0.0), 8.0),
        ((10, 10, 4, 4, 0.0), (14, 10, 4, 4, 0.0), 0.0),  # a common side
        ((10, 10, 2, 2, QUARTER), (10, 10, 10, 10, 0.0), 4.0),  # inside
        ((10, 10, 4, 4, QUARTER), (10, 10, 4, 4, 0.0), 32 * (math.sqrt(2) - 1)),  # a regular octagon
        ((10, 10, 0, 4, 0.2), (10, 10, 4, 4, 0.0), 0.0),
        ((10, 10, -3, 4, 0.2), (10, 10, 4, 4, 0.0), 0.0),  # plain distances may give negative sides
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_overlap_of_special_cases(one, other, common, dtype):
    boxes = torch.tensor((one, other), dtype=dtype)
    assert float(rotated_intersection(boxes[0], boxes[1])) == pytest.approx(common, abs=1e-5)


def test_nothing_is_ordinary():
    none = torch.zeros(0, 5)
    assert corners_of(none).shape == (0, 4, 2)
    assert rotated_iou_matrix(none, random_boxes(3).float()).shape == (0, 3)
    assert extents(none).shape == (0, 4)
    assert rectangles_of_polygons(np.zeros((0, 2)), np.zeros(0, np.int64)).shape == (0, 5)
    assert suppress_rotated([], Suppression()) == []


def test_extents_hold_the_corners():
    boxes = random_boxes(40)
    corners = corners_of(boxes)
    torch.testing.assert_close(extents(boxes), torch.cat((corners.amin(1), corners.amax(1)), dim=1))


def test_the_regularised_box_is_the_same_box():
    boxes = random_boxes(40)
    torch.testing.assert_close(rotated_iou_matrix(boxes, regularised(boxes)).diagonal(), torch.ones(40).double())
    assert ((regularised(boxes)[:, 4] >= 0) & (regularised(boxes)[:, 4] < math.pi / 2)).all()


@pytest.mark.parametrize("scale", [(2.0, 2.0), (0.5, 0.51), (3.0, 1.0)])
def test_the_way_to_another_scale_and_back_gives_the_box(scale):
    boxes, scale_xy, shift = random_boxes(40), torch.tensor(scale).double(), torch.tensor((7.0, -3.0)).double()
    there = rescaled(boxes, scale_xy, shift)
    torch.testing.assert_close(rescaled(there, 1 / scale_xy, -shift / scale_xy), boxes)
    torch.testing.assert_close(there[:, 2:4].prod(1), boxes[:, 2:4].prod(1) * scale[0] * scale[1])
    if scale[0] == scale[1]:
        torch.testing.assert_close(corners_of(there), corners_of(boxes) * scale_xy + shift)


def greedy_by_loop(boxes: Tensor, measure, iou: float) -> list[int]:
    terms = measure.prepared(boxes)
    over = measure.overlap(terms[:, :, None], terms[:, None]) > iou
    kept: list[int] = []
    for i in range(len(boxes)):
        if not any(over[j, i] for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("measure", [PROBIOU, POLYGON], ids=["probiou", "polygon"])
@pytest.mark.parametrize("block", [7, 1024])
def test_greedy_suppression_is_that_of_a_loop(measure, block, monkeypatch):
    monkeypatch.setattr("utils.rotated.suppression.MAX_BLOCK", block)
    boxes = random_boxes(90, size=90.0).float()
    xyxy, angle = unrotated(boxes)
    scores = torch.linspace(1, 0.5, len(boxes))
    (found,) = suppress_rotated(
        [Detections(xyxy, scores, torch.zeros(len(boxes)).long(), {"angle": angle})], Suppression(iou=0.3), greedy=True, measure=measure
    )  # fmt: skip
    kept = greedy_by_loop(boxes, measure, 0.3)
    assert 5 < len(kept) < 85
    assert torch.equal(found.scores, scores[kept])


def test_fast_suppression_lets_dropped_boxes_drop_others_and_classes_do_not_meet():
    boxes = torch.tensor(((0.0, 0, 20, 10, 0.2), (5, 0, 20, 10, 0.2), (10, 0, 20, 10, 0.2)))
    xyxy, angle = unrotated(boxes)

    def kept(classes: list[int], *, greedy: bool, agnostic: bool = False) -> list[int]:
        one = Detections(xyxy, torch.tensor((0.9, 0.8, 0.7)), torch.tensor(classes), {"angle": angle})
        (found,) = suppress_rotated([one], Suppression(iou=0.5, agnostic=agnostic), greedy=greedy)
        return [round(10 * s) for s in found.scores.tolist()]

    assert kept([0, 0, 0], greedy=False) == [9]
    assert kept([0, 0, 0], greedy=True) == [9, 7]
    assert kept([0, 1, 0], greedy=False) == [9, 8, 7]
    assert kept([0, 1, 0], greedy=False, agnostic=True) == [9]


def test_images_are_decided_together_as_one_by_one():
    """As on a GPU, where images of different numbers of candidates are padded."""
    from utils.rotated.suppression import _kept

    images = []
    for seed, count in enumerate((30, 0, 11)):
        xyxy, angle = unrotated(random_boxes(count, seed=seed).float())
        images.append(Detections(xyxy, torch.linspace(1, 0.5, count), torch.arange(count) % 2, {"angle": angle}))
    suppression = Suppression(iou=0.3)
    for greedy in (False, True):
        together = _kept(images, suppression, greedy=greedy, measure=PROBIOU)
        for one, mask in zip(images, together):
            (alone,) = suppress_rotated([one], suppression, greedy=greedy)
            assert torch.equal(one[mask[: len(one)]].scores, alone.scores)


def test_rectangles_of_cut_polygons_are_the_smallest_about_what_is_seen():
    boxes = random_boxes(60, size=100.0)
    hw = (70, 80)
    found = rectangles_of_polygons(corners_of(boxes).reshape(-1, 2).numpy(), np.full(60, 4), hw)
    frame = np.array(((0, 0), (hw[1], 0), (hw[1], hw[0]), (0, hw[0])), np.float32)
    for corners, rectangle in zip(corners_of(boxes).numpy(), found):
        area, seen = cv2.intersectConvexConvex(corners.astype(np.float32), frame)
        if area == 0:
            assert not rectangle.any()
            continue
        size = cv2.minAreaRect(seen.reshape(-1, 2))[1]
        assert rectangle[2] * rectangle[3] == pytest.approx(size[0] * size[1], rel=1e-3, abs=0.05)
        assert rectangle[2] >= rectangle[3]
        assert -QUARTER <= rectangle[4] < 3 * QUARTER


def test_polygons_of_other_numbers_of_corners_get_their_smallest_rectangles():
    star = [(math.cos(a) * r + 50, math.sin(a) * r + 50) for a, r in zip(np.arange(10) * math.pi / 5, (30, 12) * 5)]
    many = [(math.cos(a) * 20 + 40, math.sin(a) * 10 + 40) for a in np.arange(40) * math.pi / 20]
    square = [(0, 0), (10, 0), (10, 10), (0, 10)]
    points = np.array([*star, *many, *square], np.float32)
    found = rectangles_of_polygons(points, np.array([10, 40, 4]))
    for part, rectangle in zip((star, many, square), found):
        size = cv2.minAreaRect(np.array(part, np.float32))[1]
        assert rectangle[2] * rectangle[3] == pytest.approx(size[0] * size[1], rel=1e-3)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (1, 3, 0, 2)])
def test_corners_in_a_wrong_order_are_ordered(order):
    corners = corners_of(torch.tensor((0.5, 0.5, 0.4, 0.1, 0.7)).double()).numpy()
    ordered = ordered_corners(corners[list(order)])
    sides = np.linalg.norm(np.roll(ordered, -1, axis=0) - ordered, axis=1)
    np.testing.assert_allclose(np.sort(sides), (0.1, 0.1, 0.4, 0.4), atol=1e-9)


def test_an_inward_corner_leaves_the_hull():
    ordered = ordered_corners(np.array(((0.0, 0.0), (1.0, 0.0), (0.3, 0.3), (0.0, 1.0))))
    assert {tuple(c) for c in ordered.tolist()} == {(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)}


def test_the_canonical_box_is_the_same_box():
    boxes = random_boxes(40)
    found = torch.from_numpy(canonical(boxes.numpy()))
    torch.testing.assert_close(rotated_iou_matrix(boxes, found).diagonal(), torch.ones(40).double())
    back, angle = unrotated(found)
    torch.testing.assert_close(rotated_boxes(back, angle), found)
