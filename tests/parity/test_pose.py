"""Pose estimation against published numbers: heads, losses with their assignment, OKS, average precision, flips and defaults."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.assigners.targets import pad_targets
from models.assigners.task_aligned import TaskAlignedAssigner
from models.heads.base import Head, HeadOutput
from models.heads.pose import LightPose, Pose, Pose26
from models.losses.end_to_end import EndToEndLoss
from models.losses.keypoints import COCO_WEIGHTS, FIELD, SIGMA
from models.losses.task_aligned import TaskAlignedLoss
from tasks.keypoints import Keypoints
from tasks.pose import PoseTask
from tests import golden
from tests.parity.test_losses import batch_of, dense
from utils.boxes import cxcywh_to_xyxy, ltwh_to_xyxy
from utils.config import Hyperparameters
from utils.instances import Instances
from utils.metrics.keypoints import PoseAccumulator
from utils.metrics.matching import Objects
from utils.metrics.metrics import GroundTruth
from utils.metrics.oks import COCO_SIGMAS, KeypointSimilarity, default_sigmas
from utils.nms import Suppression
from utils.types import Batch, Detections

HEADS = {"v8": Pose, "v11": LightPose, "v26": Pose26}
CASES = [n for n in golden.all_names("heads") if "_Pose_" in n]
LOSSES = [n for n in golden.all_names("losses") if "_pose_" in n]
BRANCHES = ("one2many", "one2one")
PARTS = ("box", "cls", "dfl", "l1", "pose", "kobj", "rle")  # in the order of the losses here


def built(case: golden.Golden, name: str) -> Head:
    args = case.meta["args"]
    options = {"reg_max": args["reg_max"]} if "reg_max" in args else {}
    head = HEADS[name.split("_")[0]](args["nc"], args["ch"], args["kpt_shape"], **options)
    head.set_strides(args["stride"])
    return golden.fill_(head).eval()


def flat(maps) -> torch.Tensor:
    return torch.cat([level.flatten(2) for level in maps], dim=2)


@pytest.mark.parametrize("name", golden.cases("heads", CASES, "names"))
def test_parameter_names_shapes_and_order_match(name):
    case = golden.find("heads", name)
    assert [[k, list(v.shape)] for k, v in built(case, name).state_dict().items()] == case.meta["keys"]


@pytest.mark.parametrize("name", golden.cases("heads", CASES))
@torch.no_grad()
def test_raw_maps_and_predictions_match(name):
    case = golden.find("heads", name)
    head, nc = built(case, name), case.meta["args"]["nc"]
    features = [case.tensor(f"input_{i}") for i in range(3)]
    output = head(features)
    names = [f"_{b}" for b in BRANCHES] if len(output.branches) > 1 else [""]
    for branch, maps, fields in zip(names, output.branches, output.fields, strict=True):
        for level, raw in enumerate(maps):
            golden.assert_close(raw, case.tensor(f"raw{branch}_{level}"), 1e-5, f"raw{branch} {level}")
        golden.assert_close(flat(fields[FIELD]), case.tensor(f"kpts_raw{branch}"), 1e-5, f"keypoints{branch}")
        if SIGMA in fields:
            golden.assert_close(flat(fields[SIGMA]), case.tensor(f"kpts_sigma_raw{branch}"), 1e-5, f"sigmas{branch}")
    forms = [(head, names[-1]), (head.deploy().head, names[-1]), (head.deploy_for_suppression().head, names[0])]
    for lean, branch in forms:
        wanted = case.tensor(f"decoded{branch}").transpose(1, 2)
        found = lean.decode(lean(features))
        boxes = wanted[..., :4] if branch == "_one2one" else cxcywh_to_xyxy(wanted[..., :4])
        golden.assert_close(found.boxes, boxes, 1e-4, "boxes")
        golden.assert_close(found.scores, wanted[..., 4 : 4 + nc], 1e-4, "scores")
        golden.assert_close(found.fields["keypoints"], wanted[..., 4 + nc :], 1e-4, "keypoints")


@pytest.mark.parametrize("name", golden.cases("heads", [n for n in CASES if n.startswith("v26")]))
@torch.no_grad()
def test_the_best_without_suppression_are_those_of_the_published_selection(name):
    case = golden.find("heads", name)
    head = built(case, name)
    predictions = head.decode(head([case.tensor(f"input_{i}") for i in range(3)]))
    wanted, stable = case.tensor("end2end")[0], case.tensor("end2end_stable")[0].bool()
    (found,) = head.task.postprocess(predictions, Suppression(conf=-1.0))
    golden.assert_close(found.scores, wanted[:, 4], 1e-5, "scores")
    assert torch.equal(found.classes[stable], wanted[stable, 5].long())
    points = found.fields["keypoints"][..., : head.keypoints.values].flatten(1)
    golden.assert_close(points[stable], wanted[stable, 6:], 1e-4, "keypoints")


def loss_case(name: str) -> tuple[golden.Golden, Head, TaskAlignedLoss, HeadOutput, dict[str, torch.Tensor]]:
    """A vector, the loss of its head, and its predictions with the leaves that gradients are compared of, by name."""
    case = golden.find("losses", name)
    args = case.meta["args"]
    options = {"reg_max": args["reg_max"]} if name.startswith("v26") else {}
    head = HEADS[name.split("_")[0]](args["nc"], [32, 64, 96], args["kpt_shape"], **options)
    head.set_strides(args["strides"])
    golden.fill_(head)
    both = "e2e" in name
    loss = head.build_loss(Hyperparameters(**args["gains"]))
    if isinstance(loss, EndToEndLoss):
        if both:
            loss.begin_epoch(args["updates"], args["epochs"])
        else:
            loss.assigners = loss.assigners[:1]
            loss.set_branch_weights((1.0,))
    leaves, branches, fields = {}, [], []
    for branch in [f"{b}_" for b in BRANCHES] if both else [""]:
        maps = [leaves.setdefault(f"{branch}{i}", case.tensor(f"pred_{branch}{i}").requires_grad_()) for i in range(3)]
        own = {}
        for field, key in ((FIELD, "kpts"), (SIGMA, "kpts_sigma")):
            if f"pred_{branch}{key}" in case.arrays:
                leaf = leaves.setdefault(f"{branch}{key}", case.tensor(f"pred_{branch}{key}").requires_grad_())
                parts = leaf.split([m[0, 0].numel() for m in maps], dim=2)
                own[field] = tuple(p.unflatten(2, m.shape[2:]) for p, m in zip(parts, maps))
        branches.append(tuple(maps))
        fields.append(own)
    return case, head, loss, HeadOutput(tuple(branches), fields=tuple(fields)), leaves


def with_keypoints(case: golden.Golden) -> Batch:
    batch, keypoints = batch_of(case), case.tensor("keypoints")
    if keypoints.shape[2] == 2:
        keypoints = torch.cat((keypoints, torch.full_like(keypoints[..., :1], 2)), dim=2)
    return batch._replace(targets=batch.targets.replace(keypoints=keypoints))


@pytest.mark.parametrize("name", golden.cases("losses", LOSSES))
def test_loss_parts_and_gradients_match(name):
    case, head, loss, output, leaves = loss_case(name)
    args = case.meta["args"]
    order = sorted(range(len(args["loss_names"])), key=lambda i: PARTS.index(args["loss_names"][i].removesuffix("_loss")))
    parts = loss(output, with_keypoints(case))
    assert list(parts) == [args["loss_names"][i].removesuffix("_loss") for i in order]
    golden.assert_close(torch.stack(list(parts.values())), case.tensor("loss_vector")[order] / args["batch"], 1e-5, "parts")
    total = sum(parts.values()) * args["batch"]
    golden.assert_close(total, case.tensor("loss_total").reshape(()), 1e-5, "total")
    total.backward()
    for key, leaf in leaves.items():
        golden.assert_close(leaf.grad, case.tensor(f"grad_{key}"), 1e-5, f"gradient of {key}")
    for key, norm in case.meta.get("flow_grad_norms", {}).items():
        gradient = dict(head.named_parameters())[key].grad
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", golden.cases("losses", LOSSES, "assignment"))
@torch.no_grad()
def test_the_assignment_matches(name, monkeypatch):
    case, _, loss, output, _ = loss_case(name)
    args, batch = case.meta["args"], with_keypoints(case)
    targets = pad_targets(batch.targets, batch.max_boxes, batch_size=args["batch"], hw_px=tuple(args["imgsz"]))
    assigned = []
    assign = TaskAlignedAssigner.assign

    def record(self, predicted, truth):
        assigned.append(assign(self, predicted, truth))
        return assigned[-1]

    monkeypatch.setattr(TaskAlignedAssigner, "assign", record)
    loss(output, batch)
    for branch, found in zip([f"{b}_" for b in BRANCHES] if "e2e" in name else [""], assigned, strict=True):
        label, boxes, scores = dense(found, targets, len(case.arrays["anchor_points_px"]), args["nc"])
        counts = case.tensor(f"{branch}target_scores").sum(-1) > 0
        assert torch.equal(label >= 0, counts)
        assert torch.equal(label[counts], case.tensor(f"{branch}target_labels")[counts])
        golden.assert_close(boxes[counts], case.tensor(f"{branch}target_bboxes_px")[counts], 1e-5, "target boxes")
        golden.assert_close(scores, case.tensor(f"{branch}target_scores"), 1e-5, "target scores")


def test_object_keypoint_similarity():
    case = golden.find("ops", "oks")
    truth, found = case.arrays["gt"].astype(np.float64), case.arrays["pred"].astype(np.float64)
    n, m = len(truth), len(found)
    g, d = (index.ravel() for index in np.mgrid[:n, :m])

    def objects(keypoints: np.ndarray, **fields: np.ndarray) -> Objects:
        none = np.zeros(len(keypoints))
        boxes, fields = np.zeros((len(keypoints), 4)), {"keypoints": keypoints, **fields}
        return Objects(none.astype(int), none.astype(int), boxes, none, none, none > 0, fields)

    similarity = KeypointSimilarity(case.meta["args"]["sigmas"], by_box=False)
    likeness = similarity(objects(found), objects(truth, area=case.arrays["area"].astype(np.float64)), d, g)
    golden.assert_close(likeness.reshape(n, m), case.arrays["oks"], 1e-5)


@pytest.mark.parametrize("rule", ["coco", "ultralytics"])
def test_keypoint_average_precision(rule):
    case = golden.find("ops", "map_keypoints_synth")
    gt, det = torch.tensor(case.arrays["gt"]), torch.tensor(case.arrays["det"])
    metric = PoseAccumulator(("person",), rule=rule, sigmas=case.meta["args"]["sigmas"])
    for image in range(case.meta["args"]["images"]):
        own, known = det[:, 0] == image, gt[:, 0] == image
        found = Detections(
            ltwh_to_xyxy(det[own, 1:5]), det[own, 5], torch.zeros(int(own.sum())).long(), {"keypoints": case.tensor("det_keypoints")[own]}
        )
        none = torch.zeros(int(known.sum())).long()
        truth = GroundTruth.of_boxes(none, none, gt[known, 1:5])
        truth = truth.replace(area=gt[known, 5], fields={"keypoints": case.tensor("gt_keypoints")[known]})
        metric.update([found], truth, images=[image])
    result = metric.compute().own
    if rule == "coco":
        assert np.allclose(list(result.coco_stats.values()), case.arrays["coco_stats"], atol=1e-9)
    else:
        assert np.allclose(result.ap, case.arrays["ap"], atol=1e-9)
        assert np.allclose(result.precision_per_class, case.arrays["precision"], atol=1e-9)
        assert np.allclose(result.recall_per_class, case.arrays["recall"], atol=1e-9)
        assert np.allclose((result.map50, result.map), (case.arrays["map50"], case.arrays["map"]), atol=1e-9)


def test_keypoints_change_places_when_they_are_mirrored():
    case = golden.find("ops", "keypoint_flip")
    keypoints = case.arrays["keypoints"]
    none = np.zeros(len(keypoints))
    instances = Instances(none, np.zeros((len(keypoints), 4), np.float32), np.zeros((0, 2), np.float32), none.astype(int), keypoints)
    found = instances.mirrored(case.meta["args"]["width"], flip_idx=case.meta["args"]["flip_idx"])
    golden.assert_close(found.keypoints, case.arrays["flipped"], 1e-6)


def test_the_defaults_are_the_published_ones():
    args = golden.find("ops", "defaults_tasks").meta["args"]
    hyp = Hyperparameters()
    assert {key: getattr(hyp, key) for key in ("pose", "kobj", "rle")} == {key: args["defaults"][key] for key in ("pose", "kobj", "rle")}
    assert args["oks_sigmas"] == pytest.approx(COCO_SIGMAS, abs=1e-7)
    assert args["rle_weights"] == pytest.approx(COCO_WEIGHTS, abs=1e-6)
    assert default_sigmas(5) == (0.2,) * 5
    assert PoseTask(Keypoints(17)).keypoints.oks_sigmas == COCO_SIGMAS
