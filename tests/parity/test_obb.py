"""Rotated boxes against published numbers: overlaps, corners, suppression, average precision, heads, losses and whole networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models import build_model
from models.heads.base import Head, HeadOutput
from models.heads.rotated import LightRotatedDetect, PlainAngleEndToEndDetect, RotatedDetect
from tasks import OBB
from tests import golden
from tests.parity.test_losses import batch_of
from utils.config import Hyperparameters
from utils.metrics.matching import match_coco
from utils.metrics.metrics import GroundTruth
from utils.metrics.rotated import RotatedAccumulator, probabilistic_overlap
from utils.nms import Suppression
from utils.rotated.boxes import corners_of, regularised, rotated_boxes, unrotated
from utils.rotated.polygons import rectangles_of_polygons
from utils.rotated.probiou import LOSS_FLOOR, probiou, probiou_matrix
from utils.types import Batch, Detections, Predictions

HEADS = {"v8_OBB": RotatedDetect, "v11_OBB": LightRotatedDetect, "v26_OBB": PlainAngleEndToEndDetect}
HEAD_CASES = [n for n in golden.all_names("heads") if "_OBB" in n]
LOSS_CASES = [n for n in golden.all_names("losses") if "_obb_" in n]
MODEL_CASES = [
    n for n in golden.all_names("models") if n.endswith("-obb") and "fill_g" in golden.find("models", n).meta and n[:6] != "train_"
]
OPS = ("probiou", "rboxes", "nms_rotated", "map_obb_synth")
BRANCHES = ("one2many", "one2one")
SELECTIONS = {"end2end": {}, "end2end_agnostic": {"agnostic": True}, "end2end_max20": {"max_det": 20}}


def test_every_kind_of_vector_is_here():
    assert HEAD_CASES
    assert LOSS_CASES
    assert MODEL_CASES
    assert set(OPS) <= set(golden.all_names("ops"))


# Overlap and geometry


def test_probiou_of_all_pairs_matches():
    g = golden.find("ops", "probiou")
    golden.assert_close(probiou_matrix(g.tensor("obb_a"), g.tensor("obb_b")), g.tensor("matrix"), 1e-5)


@pytest.mark.parametrize(
    ("name", "options"), [("probiou", {}), ("probiou_ciou", {"aspect": True}), ("probiou_floor", {"floor": LOSS_FLOOR})]
)
def test_probiou_of_aligned_pairs_and_its_gradients_match(name, options):
    g = golden.find("ops", "probiou")
    one, other = g.tensor("obb1").requires_grad_(), g.tensor("obb2").requires_grad_()
    value = probiou(one, other, **options)
    differs = torch.arange(len(value)) != 1  # row 1 is one box twice: rounding decides
    golden.assert_close(value[differs], g.tensor(name)[differs], 1e-5)
    assert value[1] > 1 - 1e-3
    value.sum().backward()
    for number, boxes in ((1, one), (2, other)):
        golden.assert_close(boxes.grad[differs], g.tensor(f"{name}_grad{number}")[differs], 1e-4, f"gradient {number}")


def test_corners_and_the_regularised_form_match():
    g = golden.find("ops", "rboxes")
    golden.assert_close(corners_of(g.tensor("xywhr")), g.tensor("corners"), 1e-5)
    golden.assert_close(regularised(g.tensor("wide")), g.tensor("regularized"), 1e-5)


def test_rectangles_of_corners_have_the_published_corners_and_convention():
    g = golden.find("ops", "rboxes")
    corners = g.arrays["corners"]
    back = rectangles_of_polygons(corners.reshape(-1, 2), np.full(len(corners), 4))
    np.testing.assert_allclose(back[4:], g.arrays["back"][4:], atol=2e-3)  # boxes 0 to 3 may come back with another angle
    assert (back[:, 2] >= back[:, 3]).all()
    assert ((back[:, 4] >= -math.pi / 4) & (back[:, 4] < 3 * math.pi / 4)).all()
    found, wanted = (
        np.sort(c.round(2).view("f4,f4"), axis=1) for c in (corners_of(torch.from_numpy(back)).numpy(), g.arrays["back_corners"])
    )
    for a, b in zip(found.view("f4"), wanted.view("f4")):
        np.testing.assert_allclose(np.sort(a, axis=0), np.sort(b, axis=0), atol=0.05)


@pytest.mark.parametrize("setting", ["default", "val", "agnostic", "maxdet10", "classes02"])
def test_rotated_suppression_keeps_the_published_boxes_in_order(setting):
    g = golden.find("ops", "nms_rotated")
    (predictions,) = (OBB.from_export([g.tensor("prediction")], nc=5),)
    names = {"conf_thres": "conf", "iou_thres": "iou"}
    options = {names.get(k, k): v for k, v in g.meta["args"]["settings"][setting].items()}
    for image, found in enumerate(OBB.postprocess(predictions, Suppression(**options))):
        wanted = g.tensor(f"{setting}_img{image}")
        assert torch.equal(found.classes, wanted[:, 5].long()), image
        golden.assert_close(rotated_boxes(found.boxes, found.fields["angle"]), wanted[:, [0, 1, 2, 3, 6]], 1e-5)
        golden.assert_close(found.scores, wanted[:, 4], 1e-6)


def rows_of(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    return unrotated(torch.from_numpy(rows[:, 2:7]))


def test_average_precision_by_probiou_matches():
    g = golden.find("ops", "map_obb_synth")
    gt, det, nc = g.arrays["gt"], g.arrays["det"], g.meta["args"]["classes"]
    metric = RotatedAccumulator([str(i) for i in range(nc)], rule="ultralytics")
    for image in range(g.meta["args"]["images"]):
        rows, found = gt[gt[:, 0] == image], det[det[:, 0] == image]
        boxes, angle = rows_of(rows)
        ltwh = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)
        truth = GroundTruth.of_boxes(torch.zeros(len(rows)).long(), torch.from_numpy(rows[:, 1]).long(), ltwh)
        boxes, turned = rows_of(found)
        detections = Detections(boxes, torch.from_numpy(found[:, 7]), torch.from_numpy(found[:, 1]).long(), {"angle": turned})
        metric.update([detections], truth.replace(fields={"angle": angle}), images=[image])
    result = metric.compute()
    assert result.map50_by_probiou == pytest.approx(float(g.arrays["map50"]), abs=1e-9)
    assert result.map_by_probiou == pytest.approx(float(g.arrays["map"]), abs=1e-9)
    dets, truth = metric.objects()
    correct = match_coco(dets, truth, areas=np.array([[0, 1e10]]), similarity=probabilistic_overlap).correct[..., 0]
    assert correct.sum(0).tolist() == g.arrays["correct"].sum(0).tolist()
    assert 0 < result.map < result.map_by_probiou, "polygons overlap less than Gaussians"


# Heads


def built(name: str) -> tuple[golden.Golden, Head, HeadOutput]:
    case = golden.find("heads", name)
    args = case.meta["args"]
    head = HEADS[name.rsplit("_nc", 1)[0]](
        args["nc"], args["ch"], args["ne"], **({"reg_max": args["reg_max"]} if "reg_max" in args else {})
    )
    head.set_strides(args["stride"])
    golden.fill_(head).eval()
    with torch.no_grad():
        return case, head, head([case.tensor(f"input_{i}") for i in range(len(args["ch"]))])


@pytest.mark.parametrize("name", HEAD_CASES)
def test_parameter_names_shapes_and_order_of_heads_match(name):
    case, head, _ = built(name)
    assert [[k, list(v.shape)] for k, v in head.state_dict().items()] == case.meta["keys"]


def raw_angles(output: HeadOutput, branch: int) -> Tensor:
    return torch.cat([level.flatten(2) for level in output.fields[branch]["angle"]], dim=2)


def check_decoded(predictions: Predictions, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Against (B, 4 + nc + 1, N)."""
    (found,) = OBB.to_export(predictions)
    golden.assert_close(found[:, :4], wanted[:, :4], tolerance, "boxes")
    golden.assert_close(found[:, 4:-1], wanted[:, 4:-1], tolerance, "scores")
    golden.assert_close(found[:, -1], wanted[:, -1], tolerance, "angles")


def check_outputs(case: golden.Golden, head: Head, output: HeadOutput, tolerance: float = 1e-5) -> None:
    branches = BRANCHES if "raw_one2one_0" in case.arrays else ("",)
    for number, branch in enumerate(branches):
        suffix = f"_{branch}" if branch else ""
        for level, raw in enumerate(output.branches[number]):
            golden.assert_close(raw, case.tensor(f"raw{suffix}_{level}"), tolerance, f"{branch} {level}")
        golden.assert_close(raw_angles(output, number), case.tensor(f"angle_raw{suffix}"), tolerance, f"{branch} angle")
    check_decoded(head.decode(output), case.tensor(f"decoded_{branches[-1]}" if branches[-1] else "decoded"))


@pytest.mark.parametrize("name", HEAD_CASES)
@torch.no_grad()
def test_raw_maps_and_predictions_of_heads_match(name):
    case, head, output = built(name)
    check_outputs(case, head, output)
    if "decoded_one2many" in case.arrays:
        features = [case.tensor(f"input_{i}") for i in range(3)]
        for lean, branch, unique in ((head.deploy().head, "one2one", True), (head.deploy_for_suppression().head, "one2many", False)):
            predictions = lean.decode(lean(features))
            assert predictions.unique is unique
            check_decoded(predictions, case.tensor(f"decoded_{branch}"))


def check_selection(predictions: Predictions, wanted: Tensor, options: dict) -> None:
    """The best without suppression, against (K, 7) x y w h score class angle; equal scores may swap."""
    (found,) = OBB.postprocess(predictions, Suppression(conf=-1.0, **options))
    golden.assert_close(found.scores, wanted[:, 4], 1e-4, "scores")
    gap = (wanted[1:, 4] - wanted[:-1, 4]).abs() > 2e-6
    stable = torch.cat((gap, gap.new_ones(1))) & torch.cat((gap.new_ones(1), gap))
    assert stable.float().mean() > 0.5
    assert torch.equal(found.classes[stable], wanted[stable, 5].long())
    golden.assert_close(rotated_boxes(found.boxes, found.fields["angle"])[stable], wanted[stable][:, [0, 1, 2, 3, 6]], 1e-4, "boxes")


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", [n for n in HEAD_CASES if n.startswith("v26")])
@torch.no_grad()
def test_the_best_without_suppression_are_those_of_the_published_selection(name, selection):
    case, head, output = built(name)
    check_selection(head.decode(output), case.tensor(selection)[0], SELECTIONS[selection])


# Losses


def with_angles(case: golden.Golden) -> Batch:
    batch = batch_of(case)
    return batch._replace(targets=batch.targets.replace(angle=case.tensor("targets")[:, 6]))


def branch_of(case: golden.Golden, prefix: str, *, plain: bool) -> tuple[tuple[Tensor, ...], dict[str, tuple[Tensor, ...]], Tensor]:
    """Maps, fields, and the leaf of the angles, from which the raw channel is computed."""
    maps = tuple(case.tensor(f"pred_{prefix}{i}").requires_grad_() for i in range(3))
    angle = case.tensor(f"pred_{prefix}angle").requires_grad_()
    raw = angle if plain else torch.logit(angle / math.pi + 0.25)
    cells = [m.shape[2] * m.shape[3] for m in maps]
    levels = tuple(part.unflatten(2, m.shape[2:]) for part, m in zip(raw.split(cells, dim=2), maps))
    return maps, {"angle": levels}, angle


@pytest.mark.parametrize("name", LOSS_CASES)
def test_loss_parts_and_gradients_match(name):
    case = golden.find("losses", name)
    args, two = case.meta["args"], "_e2e_" in name
    cls = PlainAngleEndToEndDetect if two else RotatedDetect
    head = cls(args["nc"], [8] * 3, reg_max=args["reg_max"])
    head.set_strides(args["strides"])
    loss = head.build_loss(Hyperparameters(**args["gains"]))
    prefixes = tuple(f"{branch}_" for branch in BRANCHES) if two else ("",)
    parts_of = [branch_of(case, prefix, plain=two) for prefix in prefixes]
    if two:
        loss.begin_epoch(args["updates"], args["epochs"])
    parts = loss(HeadOutput(tuple(maps for maps, _, _ in parts_of), fields=tuple(fields for _, fields, _ in parts_of)), with_angles(case))
    assert loss.names == tuple(parts) == tuple(n.removesuffix("_loss") for n in args["loss_names"])
    wanted = sum(w * case.tensor(f"{p}loss_items") for w, p in zip(loss.branch_weights, prefixes))
    golden.assert_close(torch.stack(list(parts.values())), wanted, 1e-5, "parts")
    total = sum(parts.values()) * args["batch"]
    golden.assert_close(total, case.tensor("loss_total").reshape(()), 1e-5, "total")
    total.backward()
    for prefix, (maps, _, angle) in zip(prefixes, parts_of):
        for i, raw in enumerate(maps):
            golden.assert_close(raw.grad, case.tensor(f"grad_{prefix}{i}"), 2e-5, f"gradient of {prefix}{i}")
        golden.assert_close(angle.grad, case.tensor(f"grad_{prefix}angle"), 2e-5, f"gradient of {prefix}angle")


# Whole networks


@pytest.mark.parametrize("name", MODEL_CASES)
@torch.no_grad()
def test_outputs_of_networks_match(name):
    case = golden.find("models", name)
    model = golden.fill_(build_model(case.meta["config"], nc=case.meta["nc"]).eval(), case.meta["fill_g"])
    images = golden.image_array(0, (1, 3, 128, 160))
    for net in (model, model.fuse()):
        check_outputs(case, net.head, net(images))
    if "end2end" in case.arrays:
        check_selection(model.deploy().predict(images), case.tensor("end2end")[0], {})
        net = model.deploy(for_suppression=True)
        check_decoded(net.predict(images), case.tensor("decoded_one2many"))
