"""Losses of segmentation heads against published numbers: parts, gradients of all maps, and the assignment that masks take part in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.heads.anchor_segment import AnchorSegment
from models.heads.base import Head, HeadOutput
from models.heads.segment import LightEndToEndSegment, Segment
from models.losses.segment import COEFFICIENTS, PROTOTYPES, SEMANTIC
from tests import golden
from tests.parity.test_losses import batch_of as batch_of_boxes
from utils.config import Hyperparameters
from utils.types import Batch

CASES = [name for name in golden.all_names("losses") if name.startswith(("v8_seg_", "v26_seg_"))]
ANCHORED = golden.all_names("losses", "v5_seg_")
PARTS = {"box_loss": "box", "seg_loss": "seg", "cls_loss": "cls", "dfl_loss": "dfl", "l1_loss": "l1", "sem_loss": "sem"}
ANCHOR_PARTS = ("box", "seg", "obj", "cls")  # the order of this source


def packed_masks(masks: Tensor, targets: Tensor) -> Tensor:
    """Masks of objects, eight cells a byte, from an index map (B, h, w) of each image's objects or from a mask (M, h, w) an object."""
    if len(masks) == len(targets) and int(masks.max() if masks.numel() else 0) <= 1:
        own = masks.numpy().astype(bool)
    else:
        image = targets[:, 0].long()
        slot = torch.tensor([int((image[:i] == image[i]).sum()) for i in range(len(image))], dtype=torch.long)
        own = (masks[image] == slot[:, None, None] + 1).numpy()
    return torch.from_numpy(np.packbits(own, axis=2))


def batch_of(case: golden.Golden) -> Batch:
    batch = batch_of_boxes(case)
    masks, targets = case.tensor("masks"), case.tensor("targets")
    overlap = case.meta["args"].get("overlap_mask", True)
    packed = (
        packed_masks(masks if overlap else masks, targets)
        if len(targets)
        else torch.zeros(0, masks.shape[1], -(-masks.shape[2] // 8)).byte()
    )
    return batch._replace(targets=batch.targets.replace(masks=packed))


def built(name: str) -> tuple[golden.Golden, Head, HeadOutput, dict[str, Tensor]]:
    """A case, its head, the raw maps, and the leaves by the vectors' names."""
    case = golden.find("losses", name)
    args = case.meta["args"]
    newest, branches = name.startswith("v26"), ("one2many_", "one2one_") if "_e2e_" in name else ("",)
    kept = {"branches": "both" if "_e2e_" in name else "one2many"} if newest else {}
    head = (LightEndToEndSegment if newest else Segment)(args["nc"], [8] * 3, reg_max=args["reg_max"], masks=args["nm"], **kept)
    head.set_strides(args["strides"])
    names = [f"{b}{i}" for b in branches for i in range(3)] + [f"{b}mask_coefficient" for b in branches] + ["proto"]
    names += ["semantic"] if "pred_semantic" in case.arrays else []
    leaves = {n: case.tensor(f"pred_{n}").requires_grad_() for n in names}
    shapes = [leaves[f"{branches[0]}{i}"].shape[2:] for i in range(3)]
    maps = tuple(tuple(leaves[f"{b}{i}"] for i in range(3)) for b in branches)
    fields = tuple({COEFFICIENTS: as_maps(leaves[f"{b}mask_coefficient"], shapes)} for b in branches)
    shared = {PROTOTYPES: leaves["proto"]} | ({SEMANTIC: leaves["semantic"]} if "semantic" in leaves else {})
    return case, head, HeadOutput(maps, shared, fields), leaves


def as_maps(cells: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
    parts = cells.split([h * w for h, w in shapes], dim=2)
    return tuple(part.unflatten(2, shape) for part, shape in zip(parts, shapes))


@pytest.mark.parametrize("name", golden.cases("losses", CASES))
def test_loss_and_gradients_of_all_maps_match(name):
    case, head, output, leaves = built(name)
    args = case.meta["args"]
    loss = head.build_loss(Hyperparameters(**args["gains"]))
    if name.startswith("v26_seg") and "_e2e_" not in name:
        loss = with_semantic(loss, args)
    if "updates" in args:
        loss.begin_epoch(args["updates"], args["epochs"])
    parts = loss(output, batch_of(case))
    wanted = dict(zip((PARTS[n] for n in args["loss_names"]), case.tensor("loss_vector") / args["batch"]))
    if "sem" not in parts:
        assert float(wanted.pop("sem")) == 0
    assert set(parts) == set(wanted)
    largest = max(map(float, wanted.values()))
    for part, value in wanted.items():
        assert float(parts[part]) == pytest.approx(float(value), rel=1e-5, abs=1e-6 * largest), part
    total = sum(parts.values()) * args["batch"]
    golden.assert_close(total, case.tensor("loss_total").reshape(()), 1e-5, "total")
    total.backward()
    for leaf, tensor in leaves.items():
        wanted = case.tensor(f"grad_{leaf}")
        found = torch.zeros_like(wanted) if tensor.grad is None else tensor.grad
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), leaf


def with_semantic(loss, args):
    """The loss of the one-to-many branch alone together with the semantic part, as the vectors of one branch have it."""
    from models.losses.segment import SemanticTerm

    term = SemanticTerm(args["gains"]["box"])
    loss.terms = (*loss.terms, term)
    loss.names = (*loss.names, *term.names)
    loss._gains = (*loss._gains, *term.gains)
    loss.set_branch_weights(loss.branch_weights)
    return loss


@pytest.mark.parametrize("name", golden.cases("losses", ANCHORED))
def test_loss_of_the_anchor_based_head_matches(name):
    case = golden.find("losses", name)
    args = case.meta["args"]
    head = AnchorSegment(args["nc"], args["anchors_px"], [8] * 3, masks=args["nm"])
    head.set_strides(args["strides"])
    h, w = args["imgsz"]
    gains = {**args["hyp"], "cls": args["hyp"]["cls"] * 80 / args["nc"], "obj": args["hyp"]["obj"] * 640**2 / (h * w)}  # unscaled there
    loss = head.build_loss(Hyperparameters(**gains))
    leaves = [case.tensor(f"pred_{i}").requires_grad_() for i in range(3)]
    prototypes = case.tensor("pred_proto").requires_grad_()
    maps = tuple(leaf.permute(0, 1, 4, 2, 3).flatten(1, 2) for leaf in leaves)
    parts = loss(HeadOutput((maps,), {PROTOTYPES: prototypes}), batch_of(case))
    assert set(parts) == set(ANCHOR_PARTS)
    golden.assert_close(torch.stack([parts[n] for n in ANCHOR_PARTS]), case.tensor("loss_items"), 1e-5, "loss items")
    total = sum(parts.values()) * args["batch"]
    golden.assert_close(total, case.tensor("loss_total").reshape(()), 1e-5, "total")
    total.backward()
    for leaf, wanted in zip((*leaves, prototypes), (*(case.tensor(f"grad_{i}") for i in range(3)), case.tensor("grad_proto"))):
        found = torch.zeros_like(wanted) if leaf.grad is None else leaf.grad
        golden.assert_close(found, wanted, 1e-5, "gradient")
