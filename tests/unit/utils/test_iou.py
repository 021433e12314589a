"""The IoU family: worked examples, limits, empty input and numerical gradients."""

from __future__ import annotations

import math

import pytest
import torch

from models.losses.box import NAMES, WISE, BoxLoss, scaled, similarity, wise_focus
from models.losses.classification import NAMES as CLASS_LOSSES
from utils import iou as iou_module
from utils.hyperparameters import CLS_LOSSES, IOU_LOSSES
from utils.iou import SIMILARITIES, compare, nwd

A = torch.tensor([[0.0, 0.0, 4.0, 4.0]], dtype=torch.float64)
B = torch.tensor([[2.0, 2.0, 6.0, 8.0]], dtype=torch.float64)
IOU = 4 / (16 + 24 - 4)


# predicted and true box, xyxy px: equal points, a line, wrong way round, far apart, very small, very large, one inside the other
DEGENERATE = [
    [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]],
    [[3.0, 3.0, 3.0, 9.0], [3.0, 3.0, 8.0, 9.0]],
    [[3.0, 3.0, 2.0, 2.0], [0.0, 0.0, 9.0, 9.0]],
    [[0.0, 0.0, 1.0, 1.0], [6000.0, 6000.0, 6001.0, 6001.0]],
    [[5.0, 5.0, 5.0 + 1e-6, 5.0 + 1e-6], [5.0, 5.0, 5.0 + 1e-6, 5.0 + 1e-6]],
    [[-1e6, -1e6, 1e6, 1e6], [0.0, 0.0, 64.0, 64.0]],
    [[2.0, 2.0, 4.0, 4.0], [0.0, 0.0, 64.0, 64.0]],
]


def random_boxes(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 2, generator=g, dtype=torch.float64) * 20
    return torch.cat((low, low + 5 + torch.rand(n, 2, generator=g, dtype=torch.float64) * 30), dim=1)


def aspect(w1, h1, w2, h2, overlap):
    v = 4 / math.pi**2 * (math.atan(w2 / h2) - math.atan(w1 / h1)) ** 2
    return v * v / (1 - overlap + v)


RHO, DIAGONAL = 2.0**2 + 3.0**2, 6.0**2 + 8.0**2  # centres (2, 2) and (4, 5); enclosing box 6 x 8
ANGLE = 2 * 2 * 3 / RHO
EXPECTED = {
    "IoU": IOU,
    "GIoU": IOU - (48 - 36) / 48,
    "DIoU": IOU - RHO / DIAGONAL,
    "CIoU": IOU - RHO / DIAGONAL - aspect(4, 4, 4, 6, IOU),
    "EIoU": IOU - RHO / DIAGONAL - 0 - 2**2 / 8**2,
    "SIoU": IOU - (2 - math.exp((ANGLE - 2) * (2 / 6) ** 2) - math.exp((ANGLE - 2) * (3 / 8) ** 2) + (1 - math.exp(-2 / 6)) ** 4) / 2,
    "MDPIoU": IOU - (4 + 4 + 4 + 16) / (640**2 + 640**2),
    "NWD": math.exp(-math.sqrt(RHO + 2**2 / 4) / 12.8),
    "alpha-GIoU": IOU**3 - (12 / 48) ** 3,
    "Focaler-IoU": IOU / 0.95,
    "Inner-IoU": 0.8 * 0.5 / (2.8 * 2.8 + 2.8 * 4.2 - 0.8 * 0.5),  # (0.6 … 3.4)² and (2.6 … 5.4) x (2.9 … 7.1) px
}


@pytest.mark.parametrize("name", EXPECTED)
def test_values_match_hand_computed_ones(name):
    assert float(similarity(name, A, B)[0]) == pytest.approx(EXPECTED[name], rel=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in WISE])
def test_equal_boxes_have_similarity_one_and_a_finite_gradient(name):
    boxes = random_boxes(8, 0).requires_grad_()
    value = similarity(name, boxes, boxes.detach().clone())
    wanted = 1 / 0.95 * 0.95 if name.startswith("Focaler") else 1.0
    torch.testing.assert_close(value, torch.full_like(value, wanted), atol=1e-3, rtol=0)
    value.sum().backward()
    assert torch.isfinite(boxes.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_empty_and_degenerate_boxes_are_finite(name):
    loss = BoxLoss(name)
    none = torch.zeros(0, 4, requires_grad=True)
    fit = loss(none, none.detach(), mask=torch.zeros(0, dtype=torch.bool), image_hw=(64.0, 64.0))
    assert fit.loss.shape == fit.similarity.shape == (0,)
    predicted, true = torch.tensor(DEGENERATE).unbind(1)
    predicted.requires_grad_()
    fit = loss(predicted, true, mask=torch.ones(len(true), dtype=torch.bool), image_hw=(64.0, 64.0))
    fit.loss.sum().backward()
    assert torch.isfinite(fit.loss).all()
    assert torch.isfinite(fit.similarity).all()
    assert torch.isfinite(predicted.grad).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in WISE])
def test_gradient_matches_finite_differences(monkeypatch, name):
    """Against finite differences in float64. CIoU's α is a constant for the gradient, so it is held while the boxes move."""
    weights = []

    def held(v, overlap):
        weights.append(aspect_weight(v, overlap))
        return weights[0]

    aspect_weight = iou_module._aspect_weight
    monkeypatch.setattr(iou_module, "_aspect_weight", held)
    predicted, true = random_boxes(12, 1).requires_grad_(), random_boxes(12, 2)
    assert torch.autograd.gradcheck(lambda b: similarity(name, b, true), predicted)
    assert bool(weights) == ("CIoU" in name)


@pytest.mark.parametrize("name", WISE)
def test_gradient_of_wise_iou_matches_finite_differences(name):
    """R · (1 − IoU) with the focusing weight and the enclosing diagonal held, which are constants for the gradient."""
    predicted, true = random_boxes(12, 1).requires_grad_(), random_boxes(12, 2)
    loss = BoxLoss(name)
    fit = loss(predicted, true, mask=torch.ones(12, dtype=torch.bool), image_hw=(64.0, 64.0))
    (got,) = torch.autograd.grad(fit.loss.sum(), predicted)
    with torch.no_grad():
        diagonal2 = compare(predicted, true).diagonal2
        weight = wise_focus((1 - iou_module.iou(predicted, true)) / loss.mean, name)

    def held(boxes):
        pair = compare(boxes, true)
        return weight * torch.exp(pair.distance2 / diagonal2) * (1 - pair.iou)

    assert torch.autograd.gradcheck(held, predicted)
    torch.testing.assert_close(held(predicted), fit.loss)
    torch.testing.assert_close(torch.autograd.grad(held(predicted).sum(), predicted)[0], got)


def test_validation_does_not_move_the_running_mean():
    loss, mask = BoxLoss("WIoU-v3"), torch.ones(12, dtype=torch.bool)
    loss(random_boxes(12, 1).requires_grad_(), random_boxes(12, 2), mask=mask, image_hw=(64.0, 64.0))
    saved = loss.state_dict()
    loss(random_boxes(12, 3), random_boxes(12, 2), mask=mask, image_hw=(64.0, 64.0))
    assert loss.state_dict() == saved
    other = BoxLoss("WIoU-v3")
    assert other.state_dict() == {}
    other.load_state_dict(saved)
    assert other.state_dict() == saved


def test_shapes_broadcast():
    a, b = random_boxes(3, 0), random_boxes(5, 1)
    table = SIMILARITIES["CIoU"](a[:, None], b)
    assert table.shape == (3, 5)
    torch.testing.assert_close(table[1, 4], SIMILARITIES["CIoU"](a[1], b[4]))


def test_nwd_is_positive_for_disjoint_boxes():
    near, far = (nwd(A, A + d) for d in (6.0, 12.0))
    assert 0 < far < near < 1


def test_wise_iou_prefers_ordinary_boxes():
    """v3 gives less weight to hopeless boxes than to ordinary ones, v2 more; both divide by the running mean."""
    beta = torch.tensor([0.1, 1.0, 8.0])
    assert wise_focus(beta, "WIoU-v3").argmax() == 1
    assert wise_focus(beta, "WIoU-v2").argmax() == 2


def test_hyp_file_accepts_every_name():
    assert IOU_LOSSES == NAMES
    assert CLS_LOSSES == CLASS_LOSSES


def test_scaled_boxes_keep_their_centre():
    assert scaled(A, 0.5).tolist() == [[1, 1, 3, 3]]
