"""Losses on their own: no targets, branch weights, precision, options, and gradients checked numerically."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.assigners.grid import row_order
from models.heads.anchor_free import DDetect, Detect
from models.heads.base import HeadOutput
from models.heads.multi_branch import DualDDetect, TripleDDetect
from models.losses import box as box_module
from models.losses.box import BoxLoss
from models.losses.cells import as_tables, cells_and_background
from models.losses.classification import NAMES as CLASS_LOSSES
from models.losses.classification import ClassLoss
from models.losses.dfl import distribution_focal_loss
from utils.config import Hyperparameters
from utils.errors import UserError
from utils.types import Batch, Letterbox, Targets

STRIDES = (8, 16, 32)


def random_output(branches: int = 1, *, nc: int = 4, size: int = 96, batch: int = 2, seed: int = 0) -> HeadOutput:
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, 64 + nc, size // s, size // s) for s in STRIDES]
    return HeadOutput(tuple(tuple(torch.randn(shape, generator=g).requires_grad_() for shape in shapes) for _ in range(branches)))


def batch_of(targets: torch.Tensor, batch: int = 2) -> Batch:
    most = int(targets[:, 0].long().bincount().max()) if len(targets) else 0
    none = Letterbox(torch.zeros(batch, 2).long(), torch.ones(batch, 2), torch.zeros(batch, 2))
    return Batch(torch.zeros(batch, 3, 96, 96, dtype=torch.uint8), Targets.of_rows(targets), ("",) * batch, none, most)


TARGETS = torch.tensor([[1, 2, 0.5, 0.5, 0.6, 0.5], [0, 0, 0.3, 0.3, 0.2, 0.3], [1, 3, 0.7, 0.6, 0.3, 0.3]])
NO_TARGETS = torch.zeros(0, 6)


def loss_of(head_class=DDetect, *, nc: int = 4, **hyp):
    head = head_class(nc, [16] * 3 * len(head_class.branch_weights))
    head.set_strides(STRIDES)
    return head.build_loss(Hyperparameters(**hyp))


@pytest.mark.parametrize("head", [Detect, DDetect, DualDDetect, TripleDDetect])
def test_without_targets_only_the_class_part_counts(head):
    output = random_output(len(head.branch_weights))
    parts = loss_of(head)(output, batch_of(NO_TARGETS))
    assert parts["box"] == 0
    assert parts["dfl"] == 0
    wanted = sum(w * sum(F.softplus(m[:, 64:]).sum() for m in maps) for w, maps in zip(head.branch_weights, output.branches)) * 0.5
    torch.testing.assert_close(parts["cls"], wanted)
    sum(parts.values()).backward()
    for maps in output.branches:
        for m in maps:
            assert (m.grad[:, :64] == 0).all()
            assert ((m.grad[:, 64:] > 0) & m.grad[:, 64:].isfinite()).all()


def test_branch_losses_are_weighted_and_summed():
    aux, main = random_output(seed=1).branches[0], random_output(seed=2).branches[0]
    batch = batch_of(TARGETS)
    both = loss_of(DualDDetect)(HeadOutput((aux, main)), batch)
    one = loss_of()
    first, second = one(HeadOutput((aux,)), batch), one(HeadOutput((main,)), batch)
    for name in both:
        torch.testing.assert_close(both[name], 0.25 * first[name] + second[name])


def test_every_gain_scales_its_part():
    output, batch = random_output(), batch_of(TARGETS)
    plain = loss_of(box=7.5, cls=0.5, dfl=1.5)(output, batch)
    for name in plain:
        scaled = loss_of(**{"box": 7.5, "cls": 0.5, "dfl": 1.5} | {name: 3.0})(output, batch)
        for other in plain:
            factor = 3.0 / {"box": 7.5, "cls": 0.5, "dfl": 1.5}[name] if other == name else 1.0
            torch.testing.assert_close(scaled[other], plain[other] * factor)


def test_label_smoothing_moves_target_score_to_all_classes():
    """With ε the class part changes by ε · Σ score · (logit of the class − mean logit), which is 0 for equal logits."""
    flat = HeadOutput((tuple(torch.zeros_like(m) for m in random_output().main),))
    batch = batch_of(TARGETS)
    torch.testing.assert_close(loss_of(label_smoothing=0.2)(flat, batch)["cls"], loss_of()(flat, batch)["cls"])
    output = random_output()
    assert abs(loss_of(label_smoothing=0.2)(output, batch)["cls"] - loss_of()(output, batch)["cls"]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_are_summed_in_float32(dtype):
    output = HeadOutput((tuple(m.detach().to(dtype).requires_grad_() for m in random_output().main),))
    exact = HeadOutput((tuple(m.detach().float() for m in output.main),))
    batch = batch_of(TARGETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = loss_of()(output, batch)
    wanted = loss_of()(exact, batch)
    for name, part in parts.items():
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, wanted[name])
    sum(parts.values()).backward()
    assert all(m.grad.dtype == dtype and torch.isfinite(m.grad).all() for m in output.main)


@pytest.mark.parametrize("name", box_module.NAMES)
def test_every_box_loss_trains(name):
    output = random_output()
    parts = loss_of(iou_loss=name)(output, batch_of(TARGETS))
    sum(parts.values()).backward()
    assert parts["box"] > 0
    assert all(torch.isfinite(m.grad).all() for m in output.main)


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_every_class_loss_trains_down_to_the_right_class(name):
    logits = [torch.full((2, 4, 96 // s, 96 // s), -2.0).requires_grad_() for s in STRIDES]
    sides = [torch.where(torch.arange(64).view(1, -1, 1, 1) % 16 == 2, 5.0, 0.0).expand(2, -1, 96 // s, 96 // s) for s in STRIDES]
    optimizer, batch, loss = torch.optim.Adam(logits, lr=0.1), batch_of(TARGETS), loss_of(cls_loss=name)
    first = None
    for _ in range(40):
        part = loss(HeadOutput((tuple(torch.cat(m, dim=1) for m in zip(sides, logits)),)), batch)["cls"]
        optimizer.zero_grad()
        part.backward()
        optimizer.step()
        first = first or float(part.detach())
    assert float(part.detach()) < 0.7 * first
    top = torch.cat([m.detach().flatten(2) for m in logits], dim=2).amax(dim=2)  # (2, 4): best logit of each class on each image
    assert top[0].argmax() == 0
    assert set(top[1].topk(2).indices.tolist()) == {2, 3}


def test_unknown_loss_names_suggest_the_nearest():
    with pytest.raises(UserError, match="CIoU"):
        BoxLoss("CIuO")
    with pytest.raises(UserError, match="QFL"):
        ClassLoss("QFLL")


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_cells_and_background_have_the_right_gradient(gamma):
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 5, h, h, generator=g, dtype=torch.float64).requires_grad_() for h in (3, 2)] * 2
    maps = [m.detach().clone().requires_grad_() for m in maps]  # of two branches
    cell = torch.tensor([[0, 8, 9, 12], [12, 4, 4, 10], [3, 3, 12, 1], [0, 1, 2, 10]])
    order = row_order(maps[:2], (8, 16), branches=2)
    row = order.row[(torch.arange(4)[:, None] * 13 + cell).flatten()]

    def call(*m: torch.Tensor) -> tuple[torch.Tensor, ...]:
        branches = (m[:2], m[2:])
        return cells_and_background(branches, as_tables(branches, sides=2), row, gamma=gamma)

    assert torch.autograd.gradcheck(call, maps)
    sides, logits, total = call(*maps)
    for branch, (rows, background) in enumerate(zip(torch.cat((sides, logits), dim=1).unflatten(0, (2, 2, 4)), total)):
        flat = torch.cat([m.flatten(2) for m in maps[2 * branch : 2 * branch + 2]], dim=2)
        for image in range(2):
            assert torch.equal(rows[image], flat[image, :, cell[2 * branch + image]].T)
        torch.testing.assert_close(background, (flat[:, 2:].sigmoid() ** gamma * F.softplus(flat[:, 2:])).sum())


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_class_losses_match_their_formulas(name):
    loss = ClassLoss(name, gamma=1.5 if name != "BCE" else 0.0)
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    zero = torch.zeros_like(x)
    torch.testing.assert_close(loss(x, zero), loss.background_weight * x.sigmoid() ** loss.gamma * F.softplus(x))
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    torch.testing.assert_close(loss.over_background(x, t), loss(x, t) - loss(x, zero))
    assert torch.autograd.gradcheck(lambda logits: loss(logits, t), x.requires_grad_())


def test_class_losses_match_hand_computed_ones():
    x, t = torch.tensor([0.3, -1.2]), torch.tensor([1.0, 0.0])
    p, bce = x.sigmoid(), F.binary_cross_entropy_with_logits(x, t, reduction="none")
    torch.testing.assert_close(ClassLoss("BCE")(x, t), bce)
    torch.testing.assert_close(ClassLoss(gamma=2.0)(x, t), torch.stack((0.25 * (1 - p[0]) ** 2, 0.75 * p[1] ** 2)) * bce)
    torch.testing.assert_close(ClassLoss("QFL")(x, t), (t - p).abs() ** 2 * bce)
    torch.testing.assert_close(ClassLoss("VFL")(x, t), torch.stack((t[0], 0.75 * p[1] ** 2)) * bce)
    weighted = F.binary_cross_entropy_with_logits(x, t, reduction="none", pos_weight=torch.tensor(3.0))
    torch.testing.assert_close(ClassLoss(pos_weight=3.0)(x, t), weighted)


def test_distribution_focal_loss_matches_its_formula():
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_s = logits.log_softmax(-1)
    loss = distribution_focal_loss(logits, torch.tensor([2.25, -1.0, 99.0], dtype=torch.float64))
    torch.testing.assert_close(loss[0], -(0.75 * log_s[0, 2] + 0.25 * log_s[0, 3]))
    torch.testing.assert_close(loss[1], -log_s[1, 0])
    torch.testing.assert_close(loss[2], -(0.01 * log_s[2, 14] + 0.99 * log_s[2, 15]))
    assert distribution_focal_loss(logits[:0], torch.zeros(0)).shape == (0,)
