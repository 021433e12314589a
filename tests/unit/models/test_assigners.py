"""Assigners on their own: padding of targets, who gets which cell, and independence of how the work is cut up."""

from __future__ import annotations

import pytest
import torch

from models.assigners import task_aligned
from models.assigners.grid import anchor_points, expected_distances, level_grid
from models.assigners.targets import pad_targets
from models.assigners.task_aligned import TaskAlignedAssigner, pairs_inside
from utils.types import Targets

STRIDES = (8, 16, 32)


def case(n: int, *, batch: int = 3, size: int = 128, nc: int = 5, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(batch, nc, size // s, size // s, generator=g) for s in STRIDES]
    points, strides = anchor_points(maps, STRIDES)
    reach = torch.rand(batch, 4, points.shape[1], generator=g) * 4 * strides
    boxes = torch.cat((points - reach[:, :2], points + reach[:, 2:]), dim=1).transpose(1, 2)
    image = torch.arange(batch).repeat_interleave(n)[torch.randperm(batch * n, generator=g)]
    wh = 0.05 + 0.5 * torch.rand(batch * n, 2, generator=g)
    columns = (image[:, None], torch.randint(nc, (batch * n, 1), generator=g), torch.rand(batch * n, 2, generator=g), wh)
    targets = torch.cat([c.float() for c in columns], dim=1)
    return boxes, maps, pad_targets(Targets.of_rows(targets), n, batch_size=batch, hw_px=(size, size)), points


def as_rows(assignment) -> set[tuple]:
    image, pick = assignment.mask.nonzero(as_tuple=True)
    columns = (image, assignment.cell[image, pick], assignment.box[image, pick], assignment.score[image, pick])
    return {(i, c, b, round(s, 5)) for i, c, b, s in zip(*(c.tolist() for c in columns))}


def test_padding_sorts_by_image_and_keeps_the_order():
    targets = torch.tensor([[2, 7, 0.5, 0.5, 0.2, 0.4], [0, 1, 0.25, 0.5, 0.5, 0.5], [2, 3, 0.1, 0.1, 0.1, 0.1]])
    padded = pad_targets(Targets.of_rows(targets), 3, batch_size=4, hw_px=(100, 200))
    assert padded.labels.tolist() == [[1, 0, 0], [0, 0, 0], [7, 3, 0], [0, 0, 0]]
    assert padded.valid.tolist() == [[True, False, False], [False] * 3, [True, True, False], [False] * 3]
    torch.testing.assert_close(padded.boxes_xyxy[2, 0], torch.tensor([80.0, 30.0, 120.0, 70.0]))
    empty = pad_targets(Targets.empty(), 0, batch_size=2, hw_px=(64, 64))
    assert empty.boxes_xyxy.shape == (2, 0, 4)


def test_points_and_distances():
    points, strides = anchor_points([torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)], (8, 16))
    assert points.T.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8]]
    assert strides.tolist() == [[8] * 6 + [16]]
    logits = torch.full((1, 64, 1), -100.0)
    logits[0, [3, 16 + 5, 32, 48 + 15]] = 100.0
    assert expected_distances(logits, torch.arange(16.0)).flatten().tolist() == [3, 5, 0, 15]
    assert expected_distances(logits.half(), torch.arange(16.0).half()).dtype == torch.float32


@pytest.mark.parametrize("owners_contain", [True, False])
@pytest.mark.parametrize("n", [1, 7, 40])
def test_assignment_does_not_depend_on_chunk_size_or_order(monkeypatch, n, owners_contain):
    boxes, maps, targets, _ = case(n)
    assigner = TaskAlignedAssigner(owners_contain=owners_contain, min_candidate_side=16.0 * owners_contain)
    wanted = as_rows(assigner(boxes, maps, STRIDES, targets))
    assert len(wanted) > n
    monkeypatch.setattr(task_aligned, "MAX_PAIRS", 3 * boxes.shape[1] * 2)
    monkeypatch.setattr(task_aligned, "CACHED_PAIRS", 5)
    monkeypatch.setattr(task_aligned, "can_count_without_wait", lambda _: False)  # what a GPU does
    assert as_rows(assigner(boxes, maps, STRIDES, targets)) == wanted
    most = assigner.most_candidates(targets.boxes_xyxy[targets.valid], maps, STRIDES)
    assert as_rows(assigner(boxes, maps, STRIDES, targets, most_candidates=most)) == wanted
    assert as_rows(assigner(boxes, maps, STRIDES, targets, most_candidates=3 * most)) == wanted
    monkeypatch.setattr(task_aligned, "MAX_ALIGNMENTS", 2 * boxes.shape[1])  # two boxes of one image at once
    assert as_rows(assigner(boxes, maps, STRIDES, targets, most_candidates=most)) == wanted


@pytest.mark.parametrize("count", [0, 1, 63, 64, 1000, 123456, 10_000_000])
def test_lengths_are_a_little_more_than_the_count_and_few(count):
    length = task_aligned._rounded_up(count)
    assert count < length <= 1.27 * count + 130
    assert length % (1 << max(length.bit_length() - 5, 0)) == 0


def test_pairs_are_the_cells_strictly_inside():
    grid = level_grid([torch.empty(1, 1, 4, 6)], (8,))
    low = torch.tensor([[4.0, 0.0], [0.0, 0.0], [-50.0, -50.0], [1.0, 1.0], [21.0, 9.0]])
    high = torch.tensor([[20.0, 13.0], [3.0, 3.0], [99.0, 99.0], [47.0, 31.0], [20.0, 8.0]])
    valid = torch.tensor([True, True, True, False, True])
    area = torch.cat((-low.T, high.T))
    listed = pairs_inside(area, valid, grid)
    found = set(zip(listed.row.tolist(), listed.cell.tolist()))
    assert len(found) == len(listed.row)
    x, y = grid.centres
    inside = (x > low[:, :1]) & (x < high[:, :1]) & (y > low[:, 1:]) & (y < high[:, 1:]) & valid[:, None]
    assert found == {tuple(pair) for pair in inside.nonzero().tolist()}
    some = pairs_inside(area, valid, grid, length=6, first=3)
    assert torch.equal(some.row, listed.row[3:9])
    assert torch.equal(some.cell, listed.cell[3:9])
    filled = pairs_inside(area, valid, grid, length=len(listed.row) + 5)
    assert filled.inside.tolist() == [True] * len(listed.row) + [False] * 5
    assert torch.equal(filled.row[:-5], listed.row)
    assert torch.equal(filled.cell[:-5], listed.cell)
    assert filled.cell.max() < 24
    assert {c for r, c in found if r == 0} == {1, 7}  # a centre on the edge (x = 4 and x = 20) is outside
    assert {r for r, _ in found} == {0, 2}
    assert sum(r == 2 for r, _ in found) == 24


def test_each_box_gets_at_most_topk_cells_inside_it_and_each_cell_one_box():
    boxes, maps, targets, points = case(12, seed=3)
    got = TaskAlignedAssigner(topk=6)(boxes, maps, STRIDES, targets)
    rows = as_rows(got)
    assert len({(i, c) for i, c, _, _ in rows}) == len(rows)
    for i in range(3):
        for b in range(12):
            cells = [c for image, c, box, _ in rows if (image, box) == (i, b)]
            left, top, right, bottom = targets.boxes_xyxy[i, b].tolist()
            assert all(left < points[0, c] < right and top < points[1, c] < bottom for c in cells)
    assert (got.score[~got.mask] == 0).all()


def test_a_contested_cell_goes_to_the_box_it_overlaps_most():
    """One level, one cell that two boxes want; its prediction equals the second box."""
    rows = torch.tensor([[0, 0, 0.5, 0.5, 1, 1], [0, 1, 0.5, 0.5, 0.5, 0.5]])
    targets = pad_targets(Targets.of_rows(rows), 2, batch_size=1, hw_px=(8, 8))
    boxes = torch.tensor([[[2.0, 2.0, 6.0, 6.0]]])
    got = TaskAlignedAssigner()(boxes, [torch.zeros(1, 2, 1, 1)], (8,), targets)
    assert got.mask.sum() == 1
    assert got.box[got.mask].tolist() == [1]
    torch.testing.assert_close(got.score[got.mask], torch.ones(1))


def test_small_boxes_get_candidates_only_from_an_enlarged_area():
    _, maps, _, points = case(1, batch=1)
    boxes = torch.tensor([62.0, 62.0, 66.0, 66.0]).expand(1, points.shape[1], 4)
    tiny = pad_targets(Targets.of_rows(torch.tensor([[0, 1, 0.5, 0.5, 0.02, 0.02]])), 1, batch_size=1, hw_px=(128, 128))
    assert TaskAlignedAssigner()(boxes, maps, STRIDES, tiny).mask.sum() == 0
    assert TaskAlignedAssigner(min_candidate_side=16)(boxes, maps, STRIDES, tiny).mask.sum() > 0
