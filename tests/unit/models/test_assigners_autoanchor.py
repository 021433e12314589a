"""Autoanchor: the published metric, keeping what suits, replacing what does not, and saying so."""

from __future__ import annotations

import pytest
import torch

from models.assigners.autoanchor import anchor_fit, better_anchors, find_anchors, guessed_anchors, sizes_in_training
from models.heads.anchor_based import AnchorDetect, IDetect
from tests import golden
from utils.errors import UserError

COCO = torch.tensor([[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]).view(3, 3, 2).float()


def test_anchor_fitness_matches_the_published_one():
    case = golden.find("ops", "autoanchor_metric")
    labels, shapes = case.tensor("labels"), case.tensor("shapes_wh")
    sizes = sizes_in_training(labels[:, 4:], shapes[labels[:, 0].long()], case.meta["args"]["imgsz"])
    golden.assert_close(sizes, case.tensor("wh_px"), 1e-5)
    fit = anchor_fit(case.tensor("wh_px"), case.tensor("anchors"), anchor_t=case.meta["args"]["thr"])
    assert fit.recall == pytest.approx(float(case.arrays["bpr"]), abs=1e-6)
    assert fit.anchors_a_box == pytest.approx(float(case.arrays["aat"]), abs=1e-5)


def tall_boxes(n: int = 400) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.stack((4 + 4 * torch.rand(n, generator=g), 60 + 300 * torch.rand(n, generator=g)), dim=1)


def test_fitting_anchors_are_kept():
    anchors, line = better_anchors(COCO.flatten(0, 1).repeat(5, 1) * 1.1, COCO)
    assert torch.equal(anchors, COCO)
    assert line.startswith("anchors: kept (")


def test_unfit_anchors_are_replaced_and_reported():
    wh = tall_boxes()
    anchors, line = better_anchors(wh, COCO, generations=200)
    assert anchor_fit(wh, COCO).recall < 0.5
    assert anchor_fit(wh, anchors).recall > 0.98
    assert line.startswith("anchors: replaced (")
    areas = anchors.prod(dim=-1).flatten()
    assert anchors.shape == COCO.shape
    assert (areas.diff() >= 0).all()
    again, _ = better_anchors(wh, COCO, generations=200)
    assert torch.equal(again, anchors)


def test_mutation_improves_on_k_means():
    wh = tall_boxes()
    assert anchor_fit(wh, find_anchors(wh, 9, generations=300)).fitness > anchor_fit(wh, find_anchors(wh, 9, generations=0)).fitness


def test_default_anchors_are_always_refitted():
    guess = guessed_anchors(3, (8, 16, 32))
    sides = guess.prod(dim=-1).sqrt().flatten()
    torch.testing.assert_close(sides, 24 * 2 ** (torch.arange(9) / 3))  # one geometric row over the levels
    wh = guess.flatten(0, 1).repeat(5, 1) * 1.3
    assert torch.equal(better_anchors(wh, guess)[0], guess)
    anchors, line = better_anchors(wh, guess, guessed=True, generations=50)
    assert line.startswith("anchors: fitted to the data (")
    assert anchor_fit(wh, anchors).fitness > anchor_fit(wh, guess).fitness
    kept, line = better_anchors(wh[:4], guess, guessed=True)
    assert torch.equal(kept, guess)
    assert line.startswith("anchors: the first guess is kept (")
    assert "too few" in line


def test_few_and_no_boxes_keep_the_anchors():
    assert torch.equal(better_anchors(torch.zeros(0, 2), COCO)[0], COCO)
    anchors, line = better_anchors(tall_boxes(3), COCO)
    assert torch.equal(anchors, COCO)
    assert "too few" in line
    with pytest.raises(UserError, match="too few"):
        find_anchors(tall_boxes(3), 9)


@pytest.mark.parametrize("head", [AnchorDetect, IDetect])
def test_a_head_takes_new_anchors_in_px(head):
    built = head(3, COCO.flatten(1).tolist(), [8, 8, 8])
    built.set_strides((8, 16, 32))
    built.set_anchors(COCO * 2)
    assert torch.equal(built.anchors, COCO * 2 / torch.tensor([8.0, 16.0, 32.0]).view(3, 1, 1))
    if head is IDetect:
        assert torch.equal(built.anchor_grid.flatten(), (COCO * 2).flatten())


def test_anchors_are_sorted_by_level():
    built = AnchorDetect(3, COCO.flip(0).flatten(1).tolist(), [8, 8, 8])
    built.set_strides((8, 16, 32))
    assert torch.equal(built.anchors_px, COCO)


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match="anchors for 2 levels"):
        AnchorDetect(3, COCO[:2].flatten(1).tolist(), [8, 8, 8])
