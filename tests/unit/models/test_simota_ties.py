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


@pytest.mark.parametrize("candidates", [6, 40, 400])
def test_equal_costs_are_chosen_as_box_by_box(candidates):
    generator = torch.Generator().manual_seed(candidates)
    cost = torch.randint(0, 4, (3, 5, candidates), generator=generator).float()
    mask = torch.rand(3, candidates, generator=generator) < 0.8
    mask[:, :3] = True
    cost = cost.masked_fill(~mask[:, None], torch.inf)
    count = torch.randint(1, 4, (3, 5), generator=generator)
    got = _as_published(cost, count, cost.topk(4, dim=-1, largest=False).indices, mask)
    assert [[row[:n] for row, n in zip(rows, ns)] for rows, ns in zip(got.tolist(), count.tolist())] == one_by_one(cost, count, mask)


def test_an_image_without_candidates_is_left_alone():
    cost, mask = torch.full((1, 2, 3), torch.inf), torch.zeros(1, 3, dtype=torch.bool)
    any_order = torch.tensor([[[0, 1], [2, 0]]])
    assert torch.equal(_as_published(cost, torch.ones(1, 2, dtype=torch.int), any_order.clone(), mask), any_order)
