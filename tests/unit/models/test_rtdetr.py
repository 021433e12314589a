"""RT-DETR: its head equals the published one, its loss the formulas; it trains, predicts without suppression, deploys and exports."""

from __future__ import annotations

import builtins
import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import build_model
from models.assigners.denoising import DenoisingTargets, group_count, noisy_objects, visibility
from models.assigners.hungarian import cost_matrix, match
from models.assigners.targets import PaddedTargets
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, model_from_checkpoint, save_checkpoint
from models.heads.rtdetr import RTDETRDecoder
from models.losses import classification
from models.losses.set_prediction import DENOISING
from models.transfer.transfer import Source, transfer
from tests.fake_cuda import GPU, fake_cuda
from tests.foreign_models import convert_model, layout, randomize_, raw_yaml, save_stripped
from tests.golden import assert_close, fill_, input_array
from utils.boxes import cxcywh_to_xyxy
from utils.errors import UserError
from utils.hyperparameters import Hyperparameters
from utils.nms import Suppression
from utils.types import Batch, Letterbox, Targets

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
ROOT = Path(__file__).parents[3]
HYP = Hyperparameters.from_yaml(ROOT / "data" / "hyps" / "hyp.rtdetr.yaml")
SIZES = [32, 20, 2, 4, 2, 64]  # width, queries, points, heads, layers, hidden width
ROWS = [
    [-1, 1, "HGStem", [8, 8]], [-1, 2, "HGBlock", [8, 16, 3]],
    [-1, 1, "DWConv", [16, 3, 2, 1, False]], [-1, 2, "HGBlock", [8, 32, 5, True, False]],
    [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "AIFI", [64, 4]],
]  # fmt: skip


def network(nc=3, *, rows=(), sizes=SIZES, **options):
    head = [*rows, [[3, 4, -1], 1, "RTDETRDecoder", [nc, *sizes]]]
    cfg = {"nc": nc, "backbone": ROWS[:4], "head": [ROWS[4], [-1, 1, "Conv", [32, 3, 2]], ROWS[5], *head]}
    cfg["head"][-1][0] = [3, 4, 6 + len(rows)]
    return build_model(cfg, **options)


def batch_of(rows, images=2, side=64):
    rows = torch.as_tensor(rows, dtype=torch.float32).reshape(-1, 6)
    most = int(torch.bincount(rows[:, 0].long(), minlength=1).max()) if len(rows) else 0
    pictures = (torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    letterbox = Letterbox(torch.full((images, 2), side), torch.ones(images, 2), torch.zeros(images, 2))
    return Batch(pictures, Targets.of_rows(rows), ("",) * images, letterbox, most)


BATCH = batch_of([[0, 1, 0.4, 0.5, 0.3, 0.4], [0, 2, 0.6, 0.5, 0.2, 0.5], [1, 0, 0.5, 0.4, 0.6, 0.3]])


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests" / "goldens" / "rtdetr" / "decoder.npz") as z:
        meta = json.loads(str(z["meta"]))
        return meta, {k: torch.from_numpy(z[k]) for k in z.files if k != "meta"}


def published_head(meta):
    args = meta["args"]
    return fill_(RTDETRDecoder(args["nc"], args["ch"], *(args[k] for k in ("hd", "nq", "ndp", "nh", "ndl", "d_ffn"))))


def in_order_of(ours, theirs):
    """Which of our queries each published one is: theirs are sorted by score, ours by cell."""
    distance = torch.cdist(theirs.double(), ours.double(), p=1)
    assert distance.min(dim=-1).values.max() < 1e-3
    order = distance.argmin(dim=-1)
    assert all(len(set(o.tolist())) == len(o) for o in order)
    return order[..., None]


def test_names_and_predictions_are_those_of_the_published_head(golden):
    meta, arrays = golden
    head = published_head(meta)
    assert [[k, list(v.shape)] for k, v in head.state_dict().items()] == meta["keys"]
    head.eval()
    with torch.no_grad():
        ours = head([input_array(i, s) for i, s in enumerate(meta["input_shapes"])]).main[0]
    theirs = torch.cat((arrays["eval_boxes"], arrays["eval_scores"]), dim=-1)
    assert_close(ours.gather(1, in_order_of(ours, theirs).expand_as(theirs)), theirs, 1e-5, "queries")


def test_losses_and_gradients_are_the_published_ones(golden, monkeypatch):
    pytest.importorskip("scipy")
    meta, arrays = golden
    monkeypatch.setattr(classification, "VARIFOCAL_ALPHA", 0.25)  # of that implementation; the paper's 0.75 and 2 are the defaults
    head = published_head(meta).train()
    inputs = [input_array(i, s).requires_grad_() for i, s in enumerate(meta["input_shapes"])]
    output = head(inputs)
    for stage, (maps,) in enumerate(output.branches):
        theirs = torch.cat((arrays["train_boxes"][stage], arrays["train_scores"][stage]), dim=-1)
        assert_close(maps.gather(1, in_order_of(maps.detach(), theirs).expand_as(theirs)), theirs, 1e-5, f"stage {stage}")
    parts = head.build_loss(HYP.replace(fl_gamma=1.5))(output, batch_of(arrays["targets"]))
    for ours, theirs in (("box", "giou"), ("cls", "class"), ("l1", "bbox")):
        assert_close(parts[ours].detach(), arrays[f"loss_loss_{theirs}"] + arrays[f"loss_loss_{theirs}_aux"], 1e-5, ours)
    (sum(parts.values()) * 2).backward()  # times the images, as a training step does
    for i, x in enumerate(inputs):
        assert_close(x.grad, arrays[f"grad_input_{i}"], 1e-4, f"input {i}")
    parameters = dict(head.named_parameters())
    for name in (n for n in arrays if n.startswith("grad_param_")):
        assert_close(parameters[name.removeprefix("grad_param_")].grad, arrays[name], 1e-4, name)


def test_matching_is_the_cheapest_of_all_assignments():
    pytest.importorskip("scipy")
    draw = torch.Generator().manual_seed(1)
    boxes = cxcywh_to_xyxy(torch.rand(2, 2, 5, 4, generator=draw) * 0.5 + 0.2)
    logits = torch.randn(2, 2, 5, 3, generator=draw)
    wanted = cxcywh_to_xyxy(torch.rand(2, 3, 4, generator=draw) * 0.5 + 0.2)
    valid = torch.tensor([[True, True, True], [True, False, True]])
    targets = PaddedTargets(torch.randint(3, (2, 3), generator=draw), wanted * valid[..., None], valid)
    found, costs = match(boxes, logits, targets), cost_matrix(boxes, logits, targets)
    assert torch.equal(found.valid, valid.expand(2, -1, -1))
    for layer, image in itertools.product(range(2), range(2)):
        places = valid[image].nonzero().flatten().tolist()
        own, ways = costs[layer, image], itertools.permutations(range(5), len(places))
        price = {way: sum(float(own[r, c]) for r, c in zip(way, places)) for way in ways}
        assert tuple(found.query[layer, image, places].tolist()) == min(price, key=price.get)


def test_more_boxes_than_queries_leave_boxes_without_one():
    pytest.importorskip("scipy")
    boxes = torch.rand(1, 6, 2).repeat(1, 1, 2) + torch.tensor([0, 0, 0.1, 0.1])
    targets = PaddedTargets(torch.zeros(1, 4).long(), boxes[:, 2:], torch.ones(1, 4).bool())
    found = match(boxes[None, :, :2], torch.zeros(1, 1, 2, 1), targets)
    assert found.valid.sum() == 2
    assert sorted(found.query[found.valid].tolist()) == [0, 1]


def test_costs_that_are_not_finite_are_matched_all_the_same():
    pytest.importorskip("scipy")
    targets = PaddedTargets(torch.zeros(1, 1).long(), torch.tensor([[[0.1, 0.1, 0.4, 0.4]]]), torch.ones(1, 1).bool())
    assert match(torch.full((1, 1, 3, 4), math.nan), torch.full((1, 1, 3, 2), math.nan), targets).valid.all()


def test_training_without_scipy_names_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="RTDETRDecoder: training matches queries and boxes with the package scipy: pip install scipy"):
        network().head.build_loss(HYP)


def test_denoising_boxes_are_moved_by_up_to_half_a_side_and_by_more():
    labels, valid = torch.tensor([[1, 2], [0, 0]]), torch.tensor([[True, True], [True, False]])
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.1]).expand(2, 2, 4)
    noisy = noisy_objects(DenoisingTargets(labels, boxes, valid), nc=3, queries=100)
    groups = group_count(2)
    assert groups == 50
    assert noisy.boxes.shape == (2, groups * 2 * 2, 4)
    corners = cxcywh_to_xyxy(noisy.boxes).unflatten(1, (groups, 2, 2))
    moved = (corners - cxcywh_to_xyxy(boxes)[:, None, None]).abs() / torch.tensor([0.1, 0.05, 0.1, 0.05])  # in half sides
    assert moved[:, :, 0].max() <= 1 + 1e-5
    assert moved[:, :, 1].min() >= 1 - 1e-5
    assert moved[:, :, 1].max() <= 2 + 1e-5
    assert moved[:, :, 0].max() > 0.9
    kept = (noisy.labels.unflatten(1, (groups, 2, 2)) == labels[:, None, None]).float().mean()
    assert 0.75 < kept < 0.92  # a quarter is exchanged, a third of that for the same class


def test_matching_queries_see_no_ground_truth_and_groups_not_each_other():
    sees = visibility(8, 2, 3, torch.device("cpu"))
    expected = torch.zeros(11, 11, dtype=torch.bool)
    expected[:, 8:] = True
    expected[:4, :4] = expected[4:8, 4:8] = True
    assert torch.equal(sees, expected)


def test_predictions_of_matching_queries_do_not_depend_on_the_objects():
    model = network().train()
    images = BATCH.images / 255
    alone, beside = model(images), model(images, model.head.targets_of(BATCH))
    assert len(alone.branches) == len(beside.branches) == 3
    for (a,), (b,) in zip(alone.branches, beside.branches):
        assert torch.allclose(a, b, atol=1e-5)
    assert DENOISING not in alone.shared
    assert beside.shared[DENOISING].shape == (2, 2, group_count(2) * 2 * 2, 7)


@pytest.mark.parametrize("rows", [BATCH.targets.rows().tolist(), []], ids=["objects", "none"])
def test_every_parameter_gets_a_gradient(rows):
    pytest.importorskip("scipy")
    model, batch = network().train(), batch_of(rows)
    parts = model.head.build_loss(HYP)(model(batch.images / 255, model.head.targets_of(batch)), batch)
    assert all(torch.isfinite(part) for part in parts.values())
    assert (parts["box"] > 0) == bool(rows)
    sum(parts.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


def test_deterministic_training_on_a_gpu_has_only_deterministic_kernels_and_the_same_gradients(monkeypatch):
    pytest.importorskip("scipy")
    model, gradients = network().train(), {}
    for place in (torch.device("cpu"), GPU):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        with fake_cuda(monkeypatch) as seen:
            torch.manual_seed(0)  # of the noise
            there, batch = copy.deepcopy(model).to(place), BATCH.to(place)
            parts = there.head.build_loss(HYP)(there(batch.images / 255), batch)
            sum(parts.values()).backward()
            gradients[place.type] = {name: p.grad.cpu() for name, p in there.named_parameters() if p.grad is not None}
    assert not seen.nondeterministic
    for name, gradient in gradients["cpu"].items():
        torch.testing.assert_close(gradients["cuda"][name], gradient, rtol=1e-3, atol=1e-4)


def test_denoising_loss_follows_the_known_pairs():
    """With the denoising queries exactly on their boxes and sure of them, box losses are 0 and only negatives count."""
    pytest.importorskip("scipy")
    model = network().train()
    loss = model.head.build_loss(HYP)
    output = model(BATCH.images / 255)
    plain = loss(output, BATCH)
    targets = model.head.targets_of(BATCH)
    groups = group_count(2)
    boxes = targets.boxes[:, None, None].expand(-1, groups, 2, -1, -1).flatten(1, 3)
    labels = targets.labels[:, None, None].expand(-1, groups, 2, -1)
    logits = torch.where(F.one_hot(labels, 3).bool(), 20.0, -20.0)
    logits[:, :, 1] = -20.0
    perfect = torch.cat((boxes, logits.flatten(1, 3)), dim=-1)[:, None].expand(-1, 2, -1, -1)
    with_perfect = loss(output._replace(shared={**output.shared, DENOISING: perfect}), BATCH)
    for name, part in plain.items():
        assert torch.allclose(part, with_perfect[name], atol=1e-4)
    away = perfect + torch.tensor([0.01, 0, 0, 0, 0, 0, 0])
    moved = loss(output._replace(shared={**output.shared, DENOISING: away}), BATCH)
    assert torch.allclose(moved["l1"] - plain["l1"], torch.tensor(2 * HYP.dfl * 0.01), atol=1e-4)  # two layers, mean over boxes


def test_it_learns_a_batch_by_heart():
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    model = network().train()
    loss, optimizer = model.head.build_loss(HYP), torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        total = sum(loss(model(BATCH.images / 255, model.head.targets_of(BATCH)), BATCH).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(float(total.detach()))
    assert sum(history[-5:]) < 0.5 * sum(history[:5])


def test_predictions_need_no_suppression_and_are_in_px():
    model = network().eval()
    predictions = model.predict(torch.rand(1, 3, 64, 96))
    assert predictions.unique
    assert predictions.boxes.shape == (1, 20, 4)
    assert (predictions.boxes[..., 2] <= 96 * 1.5).all()
    (found,) = model.task.postprocess(predictions, Suppression(conf=0.0, max_det=10))
    assert len(found) == 10


def test_small_images_have_as_many_queries_as_cells():
    assert network(sizes=[32, 300, 2, 4, 2, 64]).eval().predict(torch.rand(1, 3, 32, 32)).boxes.shape[1] < 300


@pytest.mark.parametrize("reduced", ["fuse", "deploy"])
def test_fused_and_deployed_networks_predict_the_same(reduced):
    model = fill_(network()).eval()
    images = torch.rand(1, 3, 64, 96)
    ours, theirs = model.predict(images), getattr(model, reduced)().predict(images)
    assert torch.allclose(ours.boxes, theirs.boxes, atol=1e-2)
    assert torch.allclose(ours.scores, theirs.scores, atol=1e-5)


def test_attention_before_it_starts_as_a_no_op():
    torch.manual_seed(0)
    plain = network().eval()
    model = network(attention="EMA@detect", attention_init="identity").eval()
    assert sum(plan.identity_start for plan in model.plans) == 3
    kept = [layer for plan, layer in zip(model.plans, model.model) if not plan.identity_start]
    for layer, original in zip(kept, plain.model, strict=True):
        layer.load_state_dict(original.state_dict())
    images = torch.rand(1, 3, 64, 96)
    assert torch.equal(model.predict(images).boxes, plain.predict(images).boxes)


def test_half_precision_keeps_boxes_in_full():
    model = fill_(network()).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(images).main[0]
    assert half.dtype == torch.float32


def test_sizes_of_a_row_are_checked():
    with pytest.raises(UserError, match="hd 30: does not divide by the 4 heads"):
        network(sizes=[30, 20, 2, 4])
    with pytest.raises(UserError, match="nq 0: expected a positive whole number"):
        network(sizes=[32, 0])


def test_onnx_of_dynamic_size_agrees_with_torch(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from models.export.exporting import ExportOptions, export_model
    from models.export.model import load_exported

    model = fill_(network(sizes=[32, 60, 2, 4, 2, 64])).eval()
    export_model(model, "onnx", tmp_path / "m.onnx", ExportOptions(imgsz=(64, 64), dynamic=True))
    exported = load_exported(tmp_path / "m.onnx")
    for size in ((32, 32), (64, 96), (128, 64)):
        images = torch.rand(1, 3, *size)
        (ours,) = model.task.postprocess(model.predict(images), Suppression(conf=0.01))
        (theirs,) = model.task.postprocess(exported.predict(images), Suppression(conf=0.01))
        assert torch.allclose(ours.scores, theirs.scores, atol=1e-4)
        assert len(ours) == len(theirs)


def test_suppression_is_refused_with_the_reason_that_the_head_has_no_branch_for_it(tmp_path):
    from engine.inference.networks import LoadOptions, load_network
    from models.export.exporting import ExportOptions, export_model

    model = network().eval()
    save_checkpoint(
        tmp_path / "best.pt", Checkpoint(cfg=model.spec.to_dict(), cfg_name="tiny.yaml", names=model.names, weights=model.state_dict())
    )
    with pytest.raises(UserError, match=r"^--nms: \S+best\.pt: RT-DETR has no branch for suppression; leave --nms out$"):
        load_network(tmp_path / "best.pt", device=torch.device("cpu"), options=LoadOptions(nms=True))
    with pytest.raises(UserError, match=r"^--nms: RT-DETR has no branch for suppression; leave --nms out$"):
        export_model(model, "onnx_end2end", tmp_path / "m.onnx", ExportOptions(imgsz=(64, 64)))


def test_a_foreign_checkpoint_is_placed_whole_and_predicts_the_same(tmp_path):
    with layout("ultralytics") as classes:
        own = randomize_(build_model("rtdetr-l.yaml", nc=2))
        theirs = convert_model(own, classes, names={0: "a", 1: "b"}, raw=raw_yaml("rtdetr-l.yaml", 2))
        expected = save_stripped(theirs, tmp_path / "theirs.pt")
    checkpoint = load_checkpoint(tmp_path / "theirs.pt")
    assert list(checkpoint.weights) == list(expected)
    assert "activation" not in checkpoint.cfg  # the ReLU of the backbone is its blocks' own
    placed = model_from_checkpoint(checkpoint, source="theirs.pt").eval()
    assert all(torch.equal(placed.state_dict()[key], value) for key, value in expected.items())
    images = torch.rand(1, 3, 64, 64)
    own.load_state_dict(expected)
    assert torch.allclose(placed.float().predict(images).boxes, own.eval().predict(images).boxes, atol=1e-3)


def test_classes_of_the_same_name_keep_their_weights():
    source = fill_(network(3, names=["a", "b", "c"]))
    model = network(2, names=["c", "d"])
    transfer(model, Source(source.state_dict(), source.spec.to_dict(), source.names))
    for name in ("dec_score_head.1.weight", "dec_score_head.0.bias", "enc_score_head.weight", "denoising_class_embed.weight"):
        old, new = (m.head.state_dict()[name] for m in (source, model))
        assert torch.equal(new[0], old[2]), name
        assert not torch.equal(new[1], old[1]), name
