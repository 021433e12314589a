"""Sliced inference: windows, the merge of what they show, and the look that puts both together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.inference.predictor import Predictor
from engine.inference.sliced import SlicedPredictor
from engine.inference.slicing import WindowDetections, _greedy, _pairs, merge_windows, slice_windows
from tasks import DETECT
from utils.boxes import box_iou
from utils.nms import Suppression
from utils.types import Detections, Predictions

Box = tuple[float, float, float, float]

# Windows


@pytest.mark.parametrize("hw", [(1000, 1700), (641, 640), (640, 1281), (2560, 2560), (700, 90)])
@pytest.mark.parametrize("size", [(640, 640), (320, 500), (64, 33)])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.37, 0.9])
def test_windows_cover_the_image_exactly(hw: tuple[int, int], size: tuple[int, int], overlap: float) -> None:
    windows = slice_windows(hw, size, overlap)
    for low, length, side in ((1, hw[0], size[0]), (0, hw[1], size[1])):
        spans = windows[:, [low, low + 2]].unique(dim=0)
        side = min(side, length)
        assert (spans[:, 1] - spans[:, 0] == side).all()
        assert (int(spans[0, 0]), int(spans[-1, 1])) == (0, length)
        shared = spans[:-1, 1] - spans[1:, 0]
        assert (shared >= min(overlap * side - 1e-6, side - 1)).all()
        fewer = len(spans) - 1  # one window less could not overlap so much
        assert fewer == 0 or side + (fewer - 1) * max(side - np.ceil(overlap * side - 1e-6), 1) < length
    assert len(windows) == len(windows.unique(dim=0))


def test_windows_of_a_large_image() -> None:
    windows = slice_windows((2560, 2560), (640, 640), 0.2)
    assert len(windows) == 25
    assert windows[:5, 0].tolist() == [0, 480, 960, 1440, 1920]  # evenly spread: 160 px in common where 128 are asked for
    assert slice_windows((480, 600), (640, 640), 0.2).tolist() == [[0, 0, 600, 480]]
    assert slice_windows((640, 641), (640, 640), 0.0).tolist() == [[0, 0, 640, 640], [1, 0, 641, 640]]


# Merging; the image is 1000 px wide and 600 high

HW = (600, 1000)
LEFT, RIGHT, WHOLE = (0, 0, 600, 600), (400, 0, 1000, 600), (0, 0, 1000, 600)


def found_in_windows(*rows: tuple[Box, float, int, Box]) -> WindowDetections:
    """Boxes with score, class and the window that each was found in."""
    numbers = {w: i for i, w in enumerate(dict.fromkeys(r[3] for r in rows))}
    return WindowDetections(
        Detections(
            torch.tensor([r[0] for r in rows]).reshape(-1, 4).float(),
            torch.tensor([r[1] for r in rows]),
            torch.tensor([r[2] for r in rows]).long(),
        ),
        torch.tensor([r[3] for r in rows]).reshape(-1, 4).float(),
        torch.tensor([numbers[r[3]] for r in rows]).long(),
    )


def merged(*rows: tuple[Box, float, int, Box], agnostic: bool = False, max_det: int = 300) -> list[tuple[list[float], float]]:
    found = merge_windows(found_in_windows(*rows), HW, iou=0.45, max_det=max_det, agnostic=agnostic)
    return [(b, pytest.approx(s)) for b, s in zip(found.boxes.tolist(), found.scores.tolist())]


def test_object_in_the_overlap_is_detected_once() -> None:
    rows = ((450, 100, 550, 200), 0.7, 0, LEFT), ((452, 101, 549, 203), 0.8, 0, RIGHT), ((440, 95, 555, 210), 0.3, 0, WHOLE)
    assert merged(*rows) == [([452, 101, 549, 203], 0.8)]


def test_cut_box_is_suppressed_by_the_whole_box() -> None:
    rows = ((550, 100, 598, 200), 0.9, 0, LEFT), ((550, 100, 700, 200), 0.6, 0, RIGHT)
    assert merged(*rows) == [([550, 100, 700, 200], 0.6)]


def test_low_score_box_does_not_suppress_a_cut_box() -> None:
    rows = ((300, 100, 598, 500), 0.9, 0, LEFT), ((290, 100, 700, 500), 0.01, 0, WHOLE)
    assert merged(*rows) == [([300, 100, 598, 500], 0.9)]


def test_only_low_score_boxes_within_a_larger_box_are_suppressed() -> None:
    large, small = ((100, 100, 390, 400), 0.9, 0, WHOLE), (200, 200, 250, 250)
    assert len(merged(large, (small, 0.4, 0, LEFT))) == 1
    assert len(merged(large, (small, 0.5, 0, LEFT))) == 2


def test_cut_boxes_of_a_large_object_are_merged() -> None:
    rows = ((100, 100, 597, 300), 0.6, 0, LEFT), ((402, 104, 950, 302), 0.8, 0, RIGHT)
    assert merged(*rows) == [([100, 100, 950, 302], 0.8)]


def test_cut_boxes_are_merged_without_overlap() -> None:
    left, right = (0, 0, 500, 600), (500, 0, 1000, 600)
    assert merged(((400, 100, 500, 300), 0.6, 0, left), ((501, 95, 640, 300), 0.5, 0, right)) == [([400, 95, 640, 300], 0.6)]


def test_cut_boxes_across_windows_and_corners_are_merged() -> None:
    windows = [(0, 0, 400, 600), (300, 0, 700, 600), (600, 0, 1000, 600)]
    pieces = (50, 200, 400, 300), (300, 200, 700, 300), (600, 200, 990, 300)
    assert merged(*((p, 0.5, 0, w) for p, w in zip(pieces, windows))) == [([50, 200, 990, 300], 0.5)]
    quarters = [(x, y, x + 600, y + 400) for y in (0, 200) for x in (0, 400)]
    box = (350, 150, 650, 450)
    pieces = [(max(box[0], w[0]), max(box[1], w[1]), min(box[2], w[2]), min(box[3], w[3])) for w in quarters]
    assert merged(*((p, 0.5 + 0.1 * i, 0, w) for i, (p, w) in enumerate(zip(pieces, quarters)))) == [(list(box), 0.8)]


def test_merged_box_and_whole_box_become_one() -> None:
    rows = ((100, 100, 600, 300), 0.9, 0, LEFT), ((400, 100, 950, 300), 0.9, 0, RIGHT), ((98, 102, 940, 300), 0.5, 0, WHOLE)
    assert merged(*rows) == [([98, 102, 940, 300], 0.5)]


def test_distinct_objects_are_kept() -> None:
    touching = ((300, 100, 450, 200), 0.9, 0, LEFT), ((450, 100, 590, 200), 0.8, 0, LEFT), ((450, 100, 590, 200), 0.7, 0, RIGHT)
    assert merged(*touching) == [([300, 100, 450, 200], 0.9), ([450, 100, 590, 200], 0.8)]
    nested = ((100, 100, 390, 400), 0.9, 0, LEFT), ((200, 200, 250, 250), 0.8, 0, LEFT), ((102, 98, 390, 402), 0.7, 0, WHOLE)
    assert merged(*nested) == [([100, 100, 390, 400], 0.9), ([200, 200, 250, 250], 0.8)]
    cut_by_two_borders = ((560, 100, 600, 200), 0.9, 0, LEFT), ((400, 120, 440, 200), 0.8, 0, RIGHT)
    assert len(merged(*cut_by_two_borders)) == 2
    one_above_the_other = ((500, 100, 600, 200), 0.9, 0, LEFT), ((400, 195, 700, 320), 0.8, 0, RIGHT)
    assert len(merged(*one_above_the_other)) == 2


def test_boxes_of_one_window_do_not_suppress_each_other() -> None:
    """What suppression within a look has left beside one another stays, also through the windows."""
    rows = ((100, 100, 200, 200), 0.9, 0, LEFT), ((100, 100, 200, 160), 0.8, 0, LEFT)
    assert len(merged(*rows)) == 2


def test_image_border_does_not_count_as_a_cut() -> None:
    at_border = (0, 100, 80, 200)
    assert merged((at_border, 0.6, 0, LEFT), ((0, 90, 300, 300), 0.5, 0, WHOLE))[0] == (list(at_border), 0.6)


def test_classes_suppress_each_other_only_if_agnostic() -> None:
    rows = ((450, 100, 550, 200), 0.7, 0, LEFT), ((450, 100, 550, 200), 0.8, 1, RIGHT)
    assert len(merged(*rows)) == 2
    assert merged(*rows, agnostic=True) == [([450, 100, 550, 200], 0.8)]
    pieces = ((100, 100, 600, 300), 0.6, 0, LEFT), ((400, 100, 950, 300), 0.5, 1, RIGHT)
    assert len(merged(*pieces)) == 2


def test_empty_input_and_max_det_are_handled() -> None:
    assert merged() == []
    rows = [((100 * i, 0, 100 * i + 50, 50), 0.1 * (i + 1), 0, WHOLE) for i in range(9)]
    assert [s for _, s in merged(*rows, max_det=2)] == [pytest.approx(0.9), pytest.approx(0.8)]
    found = merge_windows(found_in_windows(), HW, iou=0.45, max_det=3)
    assert (found.boxes.shape, found.classes.dtype) == ((0, 4), torch.int64)


def test_pairs_and_greedy_selection_equal_plain_loops() -> None:
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 500, (1500, 2)), rng.uniform(0, 90, (1500, 2))
    boxes = torch.from_numpy(np.concatenate((corner, corner + side), 1)).float()
    detections = Detections(boxes, torch.rand(1500), torch.from_numpy(rng.integers(0, 3, 1500)))
    many = WindowDetections(detections, boxes, torch.from_numpy(rng.integers(0, 4, 1500)))
    overlap = box_iou(boxes, boxes)
    for agnostic in (False, True):
        wanted = (overlap > 0) & (many.view[:, None] != many.view)
        wanted &= True if agnostic else many.classes[:, None] == many.classes
        low, high = _pairs(boxes, many, agnostic=agnostic)
        got = torch.zeros_like(wanted)
        got[low, high] = True
        assert len(low) == got.sum()
        assert torch.equal(got, wanted.triu(diagonal=1))
    kept = _greedy(low, high, 1500)
    expected = np.ones(1500, bool)
    for i in range(1500):
        expected[i] = not (expected[:i] & got[:i, i].numpy()).any()
    np.testing.assert_array_equal(kept.numpy(), expected)


# Looking


class Bright:
    """Finds one bright rectangle in each image of the batch; remembers what it was given."""

    names, nc, ch, stride, task, imgsz = ("bright",), 1, 3, 32, DETECT, (64, 96)

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.dynamic = True

    def predict(self, images: Tensor, *, above: float = 0.0) -> Predictions:
        self.shapes.append(tuple(images.shape))
        boxes = torch.zeros(len(images), 1, 4)
        for i, image in enumerate(images):
            ys, xs = (image.amin(dim=0) > 0.9).nonzero().unbind(dim=1)
            if len(ys):
                boxes[i, 0] = torch.stack((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        return Predictions(boxes, torch.where(boxes.sum(dim=2, keepdim=True) > 0, 0.8, 0.0))


def look(network: Bright, size: Sequence[int] = (64, 64), *, fixed: bool = False) -> SlicedPredictor:
    network.dynamic = not fixed
    predictor = Predictor(network, Suppression(conf=0.5, iou=0.45), device=torch.device("cpu"))
    return SlicedPredictor(predictor, (size[0], size[1]), 0.25, (64, 96) if fixed else (64, 64), batch=4)


NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_detections_are_in_px_of_the_image(channels: int, dtype: type) -> None:
    image = np.full((150, 200, channels), np.iinfo(dtype).max // 4, dtype)
    image[71:95, 103:141] = np.iinfo(dtype).max
    network = Bright()
    found = look(network)(image, NOTHING)
    np.testing.assert_allclose(found.boxes, [[103, 71, 141, 95]], atol=1)
    assert {s[1:] for s in network.shapes} == {(channels, 64, 64)}
    assert [s[0] for s in network.shapes] == [4, 4, 4]  # never more than a batch


def test_windows_are_letterboxed_to_the_network_size() -> None:
    image = np.full((100, 130, 3), 20, np.uint8)
    image[30:44, 60:70] = 255
    cases = ((32, 32), False, (64, 64)), ((50, 40), True, (64, 96)), ((40, 80), False, (32, 64)), ((64, 200), False, (32, 64))
    for size, fixed, shape in cases:
        network = Bright()
        found = look(network, size, fixed=fixed)(image, NOTHING)
        np.testing.assert_allclose(found.boxes, [[60, 30, 70, 44]], atol=2.1)
        assert {s[2:] for s in network.shapes} == {shape}


def test_image_that_fits_one_window_is_predicted_once() -> None:
    network = Bright()
    whole = Detections(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.9]), torch.tensor([0]))
    assert look(network)(np.zeros((64, 50, 3), np.uint8), whole) is whole
    assert network.shapes == []


def test_detections_of_the_whole_image_are_kept() -> None:
    whole = Detections(torch.tensor([[10.0, 10, 190, 140]]), torch.tensor([0.9]), torch.tensor([0]))
    found = look(Bright())(np.zeros((150, 200, 3), np.uint8), whole)
    assert found.boxes.tolist() == whole.boxes.tolist()
    empty = look(Bright())(np.zeros((150, 200, 3), np.uint8), NOTHING)
    assert empty.boxes.shape == (0, 4)


def test_object_larger_than_any_window_is_detected_once() -> None:
    image = np.full((150, 300, 3), 20, np.uint8)
    image[60:80, 30:270] = 255
    found = look(Bright())(image, NOTHING)
    np.testing.assert_allclose(found.boxes, [[30, 60, 270, 80]], atol=1)
