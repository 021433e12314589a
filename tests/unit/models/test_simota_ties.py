"""YOLOv7's assignment where candidates cost the same: the choice among them is that of the published order of work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.assigners.simota import _as_published


def one_by_one(cost: Tensor, count: Tensor, mask: Tensor) -> list[list[list[int]]]:
    """Each image alone, each box alone: the ``count`` cheapest among the image's own candidates."""
    picks = []
    for image in range(len(cost)):
        real = mask[image].nonzero()[:, 0]
        rows = zip(cost[image][:, real], count[image].tolist())
        picks.append([real[row.topk(number, largest=False).indices].tolist() for row, number in rows])
    return picks


def cheapest(cost: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = cost.topk(min(k, cost.shape[2]), dim=-1, largest=False)
    return found.values, found.indices


@pytest.mark.parametrize("most", [3, 10])
@pytest.mark.parametrize("candidates", [12, 40, 400, 1500])
@pytest.mark.parametrize("values", [4, 50])
def test_equal_costs_are_chosen_as_box_by_box(candidates, values, most):
    generator = torch.Generator().manual_seed(candidates)
    cost = torch.randint(0, values, (4, 5, candidates), generator=generator).float()
    mask = torch.rand(4, candidates, generator=generator) < torch.tensor([1.0, 0.9, 0.5, 0.1])[:, None]
    mask[:, :11] = True
    cost = cost.masked_fill(~mask[:, None], torch.inf)
    count = torch.randint(1, most + 1, (4, 5), generator=generator).int()
    got = _as_published(cost, count, *cheapest(cost, most + 1), mask)
    assert [[sorted(row[:n]) for row, n in zip(*of)] for of in zip(got.tolist(), count.tolist())] == [
        [sorted(row) for row in rows] for rows in one_by_one(cost, count, mask)
    ]


def test_an_image_without_candidates_is_left_alone():
    cost, none = torch.full((1, 2, 3), torch.inf), torch.zeros(1, 3, dtype=torch.bool)
    any_order = torch.tensor([[[0, 1], [2, 0]]])
    value = torch.full((1, 2, 2), torch.inf)
    assert torch.equal(_as_published(cost, torch.ones(1, 2, dtype=torch.int), value, any_order.clone(), none), any_order)
