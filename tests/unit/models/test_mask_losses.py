"""The mask loss and the overlap of masks: both ways of computing them agree with a plain formula, in half precision and without objects."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.losses import mask_overlap, masks
from models.losses.mask_overlap import MaskOverlap
from models.losses.mask_pixels import Grid, Rectangles, chunks, grouped
from models.losses.masks import Learned, mask_loss
from models.losses.segment import covering_class
from utils.types import Targets

HW, HW_PX, BATCH, K, OBJECTS, PER_IMAGE = (11, 14), (44.0, 56.0), 2, 5, 6, 40


def scene(*, mask_hw: tuple[int, int] = HW) -> tuple[Grid, Tensor, Tensor]:
    """A grid with random masks, boxes (M, 4) px, and the masks (M, h, w) at the map's size."""
    g = torch.Generator().manual_seed(0)
    bits = torch.rand(OBJECTS, *mask_hw, generator=g) > 0.5
    padded = F.pad(bits, (0, -mask_hw[1] % 8)).unflatten(2, (-1, 8)).to(torch.uint8)
    packed = (padded << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(3).to(torch.uint8)
    low = torch.rand(OBJECTS, 2, generator=g) * 30
    boxes = torch.cat((low, low + 1 + torch.rand(OBJECTS, 2, generator=g) * 30), dim=1)
    rows, columns = (torch.arange(n) * m // n for n, m in zip(HW, mask_hw))
    return Grid(HW, HW_PX, packed), boxes, bits[:, rows][:, :, columns]


def learned() -> tuple[Tensor, Tensor, Learned]:
    g = torch.Generator().manual_seed(1)
    image = torch.arange(BATCH).repeat_interleave(PER_IMAGE)
    target = torch.randint(OBJECTS // BATCH, (len(image),), generator=g) * BATCH + image
    weight = torch.rand(len(image), generator=g) * (torch.rand(len(image), generator=g) > 0.3)
    coefficients = torch.randn(len(image), K, generator=g)
    return coefficients, torch.randn(BATCH, K, *HW, generator=g), Learned(image, target, weight)


def plain(coefficients: Tensor, prototypes: Tensor, what: Learned, boxes: Tensor, true: Tensor) -> Tensor:
    logits = torch.einsum("pk,pkhw->phw", coefficients, prototypes[what.image])
    cells = boxes[what.target] / 4
    row, column = torch.arange(HW[0])[:, None], torch.arange(HW[1])
    x1, y1, x2, y2 = cells[..., None, None].unbind(1)
    inside = (column >= x1) & (column < x2) & (row >= y1) & (row < y2)
    area = (cells[:, 2:] - cells[:, :2]).prod(1)
    losses = F.binary_cross_entropy_with_logits(logits, true[what.target].float(), reduction="none") * inside
    return (losses.sum((1, 2)) / area * what.weight).sum()


@pytest.mark.parametrize("counted", [True, False], ids=["in boxes", "in slices"])
@pytest.mark.parametrize("mask_hw", [HW, (22, 28), (6, 8)])
def test_loss_and_gradients_are_those_of_the_formula(monkeypatch, counted, mask_hw):
    monkeypatch.setattr(masks, "can_count_without_wait", lambda tensor: counted)
    monkeypatch.setattr(masks, "SLICE_VALUES", 1000)
    grid, boxes, true = scene(mask_hw=mask_hw)
    coefficients, prototypes, what = learned()
    found, wanted = ([t.clone().requires_grad_() for t in (coefficients, prototypes)] for _ in range(2))
    loss, reference = mask_loss(*found, what, boxes, grid), plain(*wanted, what, boxes, true)
    assert float(loss) == pytest.approx(float(reference), rel=1e-5)
    (3 * loss).backward()
    (3 * reference).backward()
    for mine, theirs in zip(found, wanted):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)


def test_half_precision_computes_in_float32_and_returns_half_gradients():
    grid, boxes, true = scene()
    coefficients, prototypes, what = learned()
    half = prototypes.half().requires_grad_()
    loss = mask_loss(coefficients, half, what, boxes, grid)
    (loss * 65536).backward()  # as a loss scaler does
    assert half.grad.dtype == torch.float16
    assert torch.isfinite(half.grad).any()
    assert float(loss) == pytest.approx(float(plain(coefficients, half.float().detach(), what, boxes, true)), rel=1e-5)


@pytest.mark.parametrize("counted", [True, False])
def test_no_object_gives_zero_and_gradients_of_zero(monkeypatch, counted):
    monkeypatch.setattr(masks, "can_count_without_wait", lambda tensor: counted)
    prototypes, coefficients = torch.randn(BATCH, K, *HW, requires_grad=True), torch.zeros(0, K, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss = mask_loss(
        coefficients, prototypes, Learned(none, none, torch.zeros(0)), torch.zeros(0, 4), Grid(HW, HW_PX, torch.zeros(0, 1, 1).byte())
    )
    loss.backward()
    assert float(loss) == 0
    assert float(prototypes.grad.abs().sum()) == 0


def test_nothing_is_kept_where_no_gradient_is_wanted():
    grid, boxes, _ = scene()
    coefficients, prototypes, what = learned()
    with torch.no_grad():
        assert not mask_loss(coefficients.requires_grad_(), prototypes, what, boxes, grid).requires_grad


def test_chunks_cover_each_cell_of_each_group_once():
    owner = torch.tensor([3, 0, 3, 1, 0, 3] + [2] * 70)
    rectangles = Rectangles(torch.tensor([0, 4, 0, 2]), torch.tensor([1, 0, 0, 3]), torch.tensor([3, 5, 0, 2]), torch.tensor([2, 1, 4, 2]))
    seen = []
    for part in chunks(grouped(owner, rectangles)):
        for group, member in zip(range(len(part.row)), part.groups.member):
            cells = list(zip(part.row[group][part.inside[group]].tolist(), part.column[group][part.inside[group]].tolist()))
            seen += [(m, cell) for m in member[member < len(owner)].tolist() for cell in cells]
    wanted = {
        (m, (r, c))
        for m, o in enumerate(owner.tolist())
        for r in range(int(rectangles.top[o]), int(rectangles.top[o] + rectangles.height[o]))
        for c in range(int(rectangles.left[o]), int(rectangles.left[o] + rectangles.width[o]))
    }
    assert len(seen) == len(set(seen))
    assert set(seen) == wanted


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("mask_hw", [HW, (22, 28)])
def test_overlap_of_masks_is_that_of_the_formula(monkeypatch, counted, mask_hw):
    monkeypatch.setattr(mask_overlap, "can_count_without_wait", lambda tensor: counted)
    monkeypatch.setattr(mask_overlap, "SLICE_VALUES", 1000)
    grid, boxes, true = scene(mask_hw=mask_hw)
    coefficients, prototypes, what = learned()
    predicted = boxes[what.target] + torch.randn(len(what.target), 4, generator=torch.Generator().manual_seed(2)) * 3
    predicted[0] = torch.tensor([-9.0, -9.0, 99.0, 99.0])
    predicted[1] = float("nan")
    target_row = torch.arange(OBJECTS).view(-1, BATCH).T  # as learned() gives objects to images
    measure = MaskOverlap(coefficients, prototypes[None], predicted.view(1, BATCH, PER_IMAGE, 4), grid, target_row)
    place = torch.arange(BATCH * PER_IMAGE)
    number = what.image * (OBJECTS // BATCH) + what.target // BATCH
    valid = place % 7 != 3
    measure.measure(place, number, valid)
    found = measure(torch.zeros(len(place)), place=place, number=number) * 2
    logits = torch.einsum("pk,pkhw->phw", coefficients, prototypes[what.image])
    row, column = torch.arange(HW[0])[:, None], torch.arange(HW[1])
    x1, y1, x2, y2 = (predicted / 4)[..., None, None].unbind(1)
    mask = (logits > 0) & (column >= x1) & (column < x2) & (row >= y1) & (row < y2)
    goal = true[what.target]
    wanted = (mask & goal).sum((1, 2)) / ((mask | goal).sum((1, 2)) + 1e-7)
    assert torch.allclose(found, wanted * valid, atol=1e-6)


@pytest.mark.parametrize("counted", [True, False])
def test_the_last_object_that_covers_a_cell_gives_its_class(monkeypatch, counted):
    from models.losses import segment

    monkeypatch.setattr(segment, "can_count_without_wait", lambda tensor: counted)
    monkeypatch.setattr(segment, "SLICE_CELLS", 300)
    bits = torch.zeros(3, 8, 16, dtype=torch.uint8)
    bits[0, 1:5, 2:9], bits[1, 3:7, 4:12], bits[2, 0:3, 0:4] = 1, 1, 1
    packed = (bits.unflatten(2, (-1, 8)) << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(3).to(torch.uint8)
    boxes = torch.tensor([[5.5 / 16, 3 / 8, 7 / 16, 4 / 8], [8 / 16, 5 / 8, 8 / 16, 4 / 8], [2 / 16, 1.5 / 8, 4 / 16, 3 / 8]])
    targets = Targets(torch.tensor([0, 0, 1]), torch.tensor([7, 4, 2]), boxes, masks=packed)
    found = covering_class(targets, Grid((8, 16), (32.0, 64.0), packed), batch=2)
    wanted = torch.full((2, 8, 16), -1)
    wanted[0][bits[0] == 1] = 7
    wanted[0][bits[1] == 1] = 4
    wanted[1][bits[2] == 1] = 2
    assert torch.equal(found, wanted)
