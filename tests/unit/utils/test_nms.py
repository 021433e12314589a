"""Suppression against a plain loop, and its ordinary edge cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from utils.boxes import box_iou
from utils.nms import Suppression, non_max_suppression
from utils.types import Detections, Predictions


def random_predictions(batch: int, n: int, nc: int, seed: int = 0) -> Predictions:
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(batch, n, 2, generator=g) * 200
    return Predictions(torch.cat((low, low + 5 + torch.rand(batch, n, 2, generator=g) * 80), dim=2), torch.rand(batch, n, nc, generator=g))


def plain(boxes: Tensor, scores: Tensor, *, conf: float, iou: float, max_det: int, multi_label: bool, agnostic: bool) -> list[tuple]:
    """The definition, row by row."""
    rows = []
    for b, s in zip(boxes, scores):
        classes = range(len(s)) if multi_label else [int(s.argmax())]
        rows += [(float(s[c]), c, b) for c in classes if s[c] > conf]
    rows.sort(key=lambda r: -r[0])
    kept: list[tuple] = []
    for score, c, b in rows:
        if all((c != k[1] and not agnostic) or box_iou(b[None], k[2][None]).item() <= iou for k in kept):
            kept.append((score, c, b))
    return kept[:max_det]


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("max_det", [5, 1000])
def test_nms_equals_its_definition(multi_label: bool, agnostic: bool, max_det: int) -> None:
    predictions = random_predictions(2, 60, 3)
    options = {"conf": 0.3, "iou": 0.4, "max_det": max_det, "multi_label": multi_label, "agnostic": agnostic}
    for found, boxes, scores in zip(non_max_suppression(predictions, Suppression(**options)), *predictions):
        expected = plain(boxes, scores, **options)
        assert found.classes.tolist() == [r[1] for r in expected]
        torch.testing.assert_close(found.boxes, torch.stack([r[2] for r in expected]))
        torch.testing.assert_close(found.scores, torch.tensor([r[0] for r in expected]))


@pytest.mark.parametrize("multi_label", [True, False])
def test_of_equal_scores_the_first_candidate_leads(multi_label: bool) -> None:
    predictions = random_predictions(2, 120, 3)
    predictions = predictions.replace(scores=(predictions.scores * 4).floor() / 4)
    options = {"conf": 0.2, "iou": 0.4, "max_det": 1000, "multi_label": multi_label, "agnostic": False}
    for found, boxes, scores in zip(non_max_suppression(predictions, Suppression(**options)), *predictions):
        expected = plain(boxes, scores, **options)
        assert found.classes.tolist() == [r[1] for r in expected]
        assert torch.equal(found.boxes, torch.stack([r[2] for r in expected]))


def test_suppressing_a_prefix_first_changes_nothing() -> None:
    """All boxes are near each other, so the prefix of best candidates holds far fewer than ``max_det`` kept ones."""
    predictions = random_predictions(1, 3000, 1)
    predictions.boxes[:, :2900] = torch.tensor([10.0, 10.0, 60.0, 60.0])
    predictions.scores[:, :2900] += 1
    found = non_max_suppression(predictions, Suppression(conf=0.0, iou=0.5, max_det=20))[0]
    assert len(found.scores) == 20
    assert found.scores[0] > 1 > found.scores[1]


def test_classes_are_kept_apart_in_large_images() -> None:
    boxes = torch.tensor([[[8000.0, 8000.0, 8100.0, 8100.0]]]).repeat(1, 2, 1)
    scores = torch.zeros(1, 2, 400)
    scores[0, 0, 0], scores[0, 1, 399] = 0.9, 0.8
    assert [len(non_max_suppression(Predictions(boxes, scores), Suppression(agnostic=a))[0].scores) for a in (False, True)] == [2, 1]


def test_class_filter_drops_boxes_whose_best_class_is_another() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 9.0, 9.0], [20.0, 0.0, 29.0, 9.0]]])
    scores = torch.tensor([[[0.9, 0.8], [0.1, 0.7]]])
    found = non_max_suppression(Predictions(boxes, scores), Suppression(classes=[1]))[0]
    assert found.scores.tolist() == pytest.approx([0.7])
    found = non_max_suppression(Predictions(boxes, scores), Suppression(classes=[1], multi_label=True))[0]
    assert found.scores.tolist() == pytest.approx([0.8, 0.7])
    assert found.classes.tolist() == [1, 1]
    assert len(non_max_suppression(Predictions(boxes, scores), Suppression(classes=[]))[0].scores) == 0


@pytest.mark.parametrize(("batch", "n", "nc"), [(2, 0, 3), (1, 0, 1), (0, 5, 3), (2, 7, 1)])
@pytest.mark.parametrize("multi_label", [True, False])
def test_empty_inputs_give_empty_detections(batch: int, n: int, nc: int, multi_label: bool) -> None:
    predictions = Predictions(torch.zeros(batch, n, 4), torch.zeros(batch, n, nc))
    found = non_max_suppression(predictions, Suppression(multi_label=multi_label))
    assert [tuple(d.boxes.shape) for d in found] == [(0, 4)] * batch
    assert all(d.classes.dtype == torch.int64 for d in found)


def test_nan_scores_never_pass() -> None:
    predictions = random_predictions(1, 10, 2)
    predictions.scores[0, :5] = float("nan")
    found = non_max_suppression(predictions, Suppression(conf=0.0, iou=1.0, multi_label=True))[0]
    assert len(found.scores) == 10
    assert not found.scores.isnan().any()


def test_best_candidates_survive_the_cap() -> None:
    predictions = random_predictions(1, 500, 2)
    found = non_max_suppression(predictions, Suppression(conf=0.0, iou=1.0, multi_label=True, max_candidates=7))[0]
    torch.testing.assert_close(found.scores, predictions.scores.flatten().sort(descending=True).values[:7])


def test_half_precision_predictions_are_suppressed() -> None:
    predictions = random_predictions(1, 50, 80)
    half = Predictions(predictions.boxes.half(), predictions.scores.half())
    found: Detections = non_max_suppression(half, Suppression(conf=0.5, multi_label=True))[0]
    assert found.boxes.dtype == torch.float16
    assert len(found.scores) > 50
