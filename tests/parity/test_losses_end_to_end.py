"""The loss of heads with two branches against published numbers: both assignments, parts, gradients, and the schedule of the weights."""

from __future__ import annotations

import pytest
import torch

from models.assigners.targets import pad_targets
from models.heads.base import HeadOutput
from models.heads.end_to_end import LightEndToEndDetect
from models.losses.end_to_end import EndToEndLoss, weights_at
from tests import golden
from tests.parity.test_losses import batch_of, dense
from utils.config import Hyperparameters

SCHEDULE = "v26_e2e_schedule"
CASES = [n for n in golden.all_names("losses") if n.startswith(("v10_e2e_", "v26_e2e_")) and n != SCHEDULE]
BRANCHES = ("one2many_", "one2one_")


def built(name: str) -> tuple[golden.Golden, EndToEndLoss, HeadOutput]:
    case = golden.find("losses", name)
    args = case.meta["args"]
    head = LightEndToEndDetect(args["nc"], [8] * 3, reg_max=args["reg_max"])
    head.set_strides(args["strides"])
    loss = head.build_loss(Hyperparameters(**args["gains"]))
    loss.begin_epoch(args["updates"], args["epochs"])
    maps = tuple(tuple(case.tensor(f"pred_{branch}{i}").requires_grad_() for i in range(3)) for branch in BRANCHES)
    return case, loss, HeadOutput(maps)


@pytest.mark.parametrize("name", golden.cases("losses", CASES))
def test_loss_and_gradients_of_both_branches_match(name):
    case, loss, output = built(name)
    args = case.meta["args"]
    assert loss.branch_weights == pytest.approx((args["o2m"], args["o2o"]), abs=1e-12)
    parts = loss(output, batch_of(case))
    assert loss.names == tuple(parts) == tuple(n.removesuffix("_loss") for n in args["loss_names"])
    both = sum(w * case.tensor(f"{b}loss_items") for w, b in zip(loss.branch_weights, BRANCHES))
    golden.assert_close(torch.stack(list(parts.values())), both, 1e-5, "parts")
    total = sum(parts.values()) * args["batch"]
    golden.assert_close(total, case.tensor("loss_total").reshape(()), 1e-5, "total")
    total.backward()
    for branch, maps in zip(BRANCHES, output.branches):
        for i, raw in enumerate(maps):
            golden.assert_close(raw.grad, case.tensor(f"grad_{branch}{i}"), 1e-5, f"gradient of {branch}{i}")


@pytest.mark.parametrize("name", golden.cases("losses", CASES, "assignment"))
@torch.no_grad()
def test_both_assignments_match(name):
    case, loss, output = built(name)
    args, batch = case.meta["args"], batch_of(case)
    targets = pad_targets(batch.targets, batch.max_boxes, batch_size=args["batch"], hw_px=tuple(args["imgsz"]))
    for branch, maps, assigner in zip(BRANCHES, output.branches, loss.assigners, strict=True):
        logits = [m[:, 4 * args["reg_max"] :] for m in maps]
        assigned = assigner(case.tensor(f"{branch}pred_bboxes_px"), logits, loss.strides, targets)
        label, boxes, scores = dense(assigned, targets, len(case.arrays["anchor_points_px"]), args["nc"])
        wanted = case.tensor(f"{branch}target_scores")
        counts = wanted.sum(-1) > 0
        assert torch.equal(label >= 0, counts)
        assert torch.equal(label[counts], case.tensor(f"{branch}target_labels")[counts])
        golden.assert_close(boxes[counts], case.tensor(f"{branch}target_bboxes_px")[counts], 1e-5, "target boxes")
        golden.assert_close(scores, wanted, 1e-5, "target scores")
        if branch == "one2one_":
            assert int(counts.sum()) <= len(batch.targets), "one cell a box at most"


@pytest.mark.parametrize("name", golden.cases("losses", [n for n in golden.all_names("losses") if n == SCHEDULE]))
def test_the_weights_of_the_branches_follow_the_published_schedule(name):
    for key, rows in golden.find("losses", name).arrays.items():
        epochs = int(key.removeprefix("epochs_"))
        assert [list(weights_at(epoch, epochs)) for epoch in range(len(rows))] == [pytest.approx(list(row), abs=1e-12) for row in rows]
