"""Losses against published numbers: parts, gradients and the assignment behind them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.assigners.anchor_ratio import Scene, anchor_grid
from models.assigners.grid import anchor_points
from models.assigners.simota import SimOTA
from models.assigners.targets import pad_targets
from models.heads.anchor_free import DDetect, Detect
from models.heads.base import HeadOutput
from models.heads.multi_branch import DualDDetect
from models.losses.task_aligned import TaskAlignedLoss
from models.losses.yolov5 import AnchorLoss, Gains
from tests import golden
from utils.config import Hyperparameters
from utils.types import Batch, Letterbox, Targets

ANCHORED = golden.all_names("losses", "v5_") + golden.all_names("losses", "v7_")
END_TO_END = ("v10_e2e", "v26_e2e")  # in test_losses_end_to_end.py
ALIGNED = [
    name for name in golden.all_names("losses") if name not in ANCHORED and not name.startswith(END_TO_END) and "_pose_" not in name
]


def batch_of(case: golden.Golden) -> Batch:
    targets = case.tensor("targets")
    size = case.meta["args"]["batch"]
    h, w = case.meta["args"]["imgsz"]
    most = int(torch.bincount(targets[:, 0].long()).max()) if len(targets) else 0
    none = Letterbox(torch.zeros(size, 2).long(), torch.ones(size, 2), torch.zeros(size, 2))
    return Batch(torch.zeros(size, 3, h, w, dtype=torch.uint8), Targets.of_rows(targets), (str(Path()),) * size, none, most)


def output_of(case: golden.Golden, prefixes: tuple[str, ...]) -> HeadOutput:
    levels = range(len(case.meta["args"]["strides"]))
    return HeadOutput(tuple(tuple(case.tensor(f"{p}pred_{i}").requires_grad_() for i in levels) for p in prefixes))


def aligned(name: str) -> tuple[golden.Golden, tuple[str, ...], TaskAlignedLoss, HeadOutput]:
    case = golden.find("losses", name)
    args = case.meta["args"]
    prefixes = ("aux_", "main_") if name.startswith("v9_dual") else ("",)
    weights = args.get("class_weights") or ()
    hyp = Hyperparameters(**args["gains"], cls_weights=weights, tal_topk=args["topk"], tal_alpha=args["alpha"], tal_beta=args["beta"])
    head = {"v8": Detect, "v9_tal": DDetect, "v9_dual": DualDDetect}[name.rsplit("_", 2)[0]](args["nc"], [8] * 3 * len(prefixes))
    head.set_strides(args["strides"])
    return case, prefixes, head.build_loss(hyp), output_of(case, prefixes)


def anchored(name: str) -> tuple[golden.Golden, AnchorLoss, HeadOutput, list[Tensor]]:
    """A case of an anchor-based loss, and its predictions in the order of the case (the main branch first)."""
    case = golden.find("losses", name)
    args = case.meta["args"]
    hyp = Hyperparameters(**args["hyp"])
    anchors = torch.tensor(args["anchors_px"]).view(len(args["strides"]), -1, 2) / torch.tensor(args["strides"]).view(-1, 1, 1)
    gains = Gains(*(args["hyp"][k] for k in ("box", "obj", "cls")))
    auxiliary = name.startswith("v7_auxota")
    assign = SimOTA(nc=args["nc"], anchor_t=hyp.anchor_t, topk=20 if auxiliary else 10) if name.startswith("v7_") else None
    weights = (0.25, 1.0) if auxiliary else (1.0,)
    loss = AnchorLoss(hyp, gains, nc=args["nc"], strides=args["strides"], anchors=lambda: anchors, branch_weights=weights, assign=assign)
    levels = len(args["strides"])
    leaves = [case.tensor(f"pred_{i}").requires_grad_() for i in range(levels * len(weights))]
    maps = [p.permute(0, 1, 4, 2, 3).flatten(1, 2) for p in leaves]
    branches = tuple(tuple(maps[i * levels : (i + 1) * levels]) for i in range(len(weights)))
    return case, loss, HeadOutput(branches[::-1]), leaves


def test_golden_cases_exist():
    assert ALIGNED
    assert ANCHORED


@pytest.mark.parametrize("name", golden.cases("losses", ANCHORED))
def test_anchor_based_loss_parts_and_gradients_match(name):
    case, loss, output, leaves = anchored(name)
    parts = loss(output, batch_of(case))
    assert tuple(parts) == ("box", "obj", "cls")
    golden.assert_close(torch.stack(list(parts.values())), case.tensor("loss_items")[:3], 1e-5, "loss items")
    total = sum(parts.values()) * case.meta["args"]["batch"]
    golden.assert_close(total, case.tensor("loss_total").reshape(()), 1e-5, "total")
    total.backward()
    for i, leaf in enumerate(leaves):
        golden.assert_close(leaf.grad, case.tensor(f"grad_{i}"), 1e-5, f"gradient {i}")


@pytest.mark.parametrize("name", golden.cases("losses", ANCHORED, "assignment"))
@torch.no_grad()
def test_anchor_based_assignment_matches(name):
    """The same places learn the same boxes on every level, in the same order where one place learns several."""
    case, loss, output, _ = anchored(name)
    args = case.meta["args"]
    anchors, batch = loss.anchors(), batch_of(case)
    grid = anchor_grid(output.main, anchors, loss.strides)
    targets = pad_targets(batch.targets, batch.max_boxes, batch_size=args["batch"], hw_px=tuple(args["imgsz"]))
    for auxiliary in (False, True)[: len(output.branches)]:
        matches = loss.assign(Scene(output.main, grid, anchors, loss.strides, targets, auxiliary))
        image, row = matches.mask.nonzero(as_tuple=True)
        place, box = matches.place[image, row], matches.box[image, row]
        begin = 0
        for level, (h, w) in enumerate(grid.sizes):
            here = grid.level[place] == level
            local = place[here] - begin
            indices = torch.stack((image[here], local // (h * w), local % (h * w) // w, local % w), dim=1)
            prefix = "assign_aux_" if auxiliary else "assign_"
            names = ("img", "anchor", "gj", "gi")
            wanted = torch.stack([case.tensor(f"{prefix}{n}_{level}") for n in names], dim=1)
            label = targets.labels[image[here], box[here]]
            if f"{prefix}cls_{level}" in case.arrays:
                labels = case.tensor(f"{prefix}cls_{level}")
            else:
                labels = case.tensor(f"{prefix}target_{level}").view(len(wanted), -1)[:, 1].long() if len(wanted) else wanted[:, 0]
            assert sorted(torch.cat((indices, label[:, None]), 1).tolist()) == sorted(torch.cat((wanted, labels[:, None]), 1).tolist())
            begin += h * w * anchors.shape[1]


@pytest.mark.parametrize("name", golden.cases("losses", ALIGNED))
def test_task_aligned_loss_parts_and_gradients_match(name):
    case, prefixes, loss, output = aligned(name)
    parts = loss(output, batch_of(case))
    assert tuple(parts) == ("box", "cls", "dfl")
    golden.assert_close(torch.stack(list(parts.values())), case.tensor("loss_items"), 1e-5, "loss items")
    total = sum(parts.values()) * case.meta["args"]["batch"]
    golden.assert_close(total, case.tensor("loss_total"), 1e-5, "total")
    total.backward()
    for prefix, maps in zip(prefixes, output.branches):
        for i, raw in enumerate(maps):
            golden.assert_close(raw.grad, case.tensor(f"{prefix}grad_{i}"), 1e-5, f"gradient of {prefix}{i}")


@pytest.mark.parametrize("name", golden.cases("losses", ALIGNED, "assignment"))
@torch.no_grad()
def test_task_aligned_assignment_matches(name):
    case, prefixes, loss, output = aligned(name)
    batch = batch_of(case)
    h, w = case.meta["args"]["imgsz"]
    targets = pad_targets(batch.targets, batch.max_boxes, batch_size=case.meta["args"]["batch"], hw_px=(h, w))
    golden.assert_close(targets.boxes_xyxy, case.tensor("gt_bboxes_px"), 1e-5, "targets")
    for prefix, maps in zip(prefixes, output.branches):
        points, _ = anchor_points(maps, loss.strides)
        golden.assert_close(points.T, case.tensor("anchor_points_px"), 1e-6, "points")
        assigned = loss.assigner(case.tensor(f"{prefix}pred_bboxes_px"), [m[:, 64:] for m in maps], loss.strides, targets)
        label, boxes, scores = dense(assigned, targets, points.shape[1], case.meta["args"]["nc"])
        wanted = case.tensor(f"{prefix}target_scores")
        counts = wanted.sum(-1) > 0  # the other foreground cells fill up a box's ten with score 0
        assert torch.equal(label >= 0, counts)
        assert torch.equal(label[counts], case.tensor(f"{prefix}target_labels")[counts])
        golden.assert_close(boxes[counts], case.tensor(f"{prefix}target_bboxes_px")[counts], 1e-5, "target boxes")
        golden.assert_close(scores, wanted, 1e-5, "target scores")


def dense(assigned, targets, cells: int, nc: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (B, N), -1 for background, boxes (B, N, 4) and scores (B, N, nc) of an assignment."""
    b, _ = targets.valid.shape
    label, boxes, scores = torch.full((b, cells), -1), torch.zeros(b, cells, 4), torch.zeros(b, cells, nc)
    image, pick = assigned.mask.nonzero(as_tuple=True)
    cell, box = assigned.cell[image, pick], assigned.box[image, pick]
    assert len({(i, c) for i, c in zip(image.tolist(), cell.tolist())}) == len(image), "a cell counts twice"
    label[image, cell] = targets.labels[image, box]
    boxes[image, cell] = targets.boxes_xyxy[image, box]
    scores[image, cell, targets.labels[image, box]] = assigned.score[image, pick]
    return label, boxes, scores
