"""Classifiers against published numbers: head, loss, whole networks, a training step, top-k, and the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.task_presets import HYPS
from models import build_model
from models.heads.base import HeadOutput
from models.heads.classify import Classify
from models.losses.cross_entropy import ClassificationLoss
from models.model import Model
from tasks import CLASSIFY
from tests import golden
from utils.config import Hyperparameters
from utils.metrics.top_k import TopKMetric
from utils.nms import Suppression
from utils.types import Batch, Letterbox, Predictions, Targets

HEADS = golden.all_names("heads", "ul_Classify")
LOSSES = golden.all_names("losses", "ul_cls")
NETWORKS = [n for n in golden.all_names("models") if n.endswith("-cls") and not n.startswith("train_")]
TRAINED = [n for n in golden.all_names("models", "train_") if n.endswith("-cls")]
WITH_OUTPUT = [n for n in NETWORKS if "probs" in golden.find("models", n).arrays]


def batch_of(classes: torch.Tensor) -> Batch:
    count = len(classes)
    letterbox = Letterbox(torch.full((count, 2), 8), torch.ones(count, 2), torch.zeros(count, 2))
    whole = torch.tensor([[0.5, 0.5, 1.0, 1.0]]).expand(count, 4)
    return Batch(torch.zeros(count, 3, 8, 8), Targets(torch.arange(count), classes, whole), ("",) * count, letterbox, 1)


def build(name: str, **options) -> Model:
    return build_model(f"{name.removeprefix('train_').removeprefix('ultralytics-')}.yaml", **options)


@pytest.mark.parametrize("name", golden.cases("heads", HEADS))
@torch.no_grad()
def test_the_head_has_the_published_names_and_gives_the_published_logits(name):
    case = golden.find("heads", name)
    head = golden.fill_(Classify(case.meta["args"]["nc"], case.meta["args"]["ch"])).eval()
    assert [[k, list(v.shape)] for k, v in head.state_dict().items()] == case.meta["keys"]
    output = head([case.tensor("input_0")])
    golden.assert_close(output.main[0].flatten(1), case.tensor("logits"), 1e-5, "logits")
    golden.assert_close(head.decode(output).scores[:, 0], case.tensor("probs"), 1e-5, "probabilities")


@pytest.mark.parametrize("name", golden.cases("losses", LOSSES))
def test_the_loss_and_its_gradient_match(name):
    case = golden.find("losses", name)
    logits = case.tensor("pred").requires_grad_()
    loss = ClassificationLoss(Hyperparameters(), nc=case.meta["args"]["nc"])
    parts = loss(HeadOutput(((logits[..., None, None],),)), batch_of(case.tensor("targets")))
    golden.assert_close(parts["cls"], case.tensor("loss_total"), 1e-5, "loss")
    golden.assert_close(parts["cls"][None], case.tensor("loss_items"), 1e-5, "loss items")
    parts["cls"].backward()
    golden.assert_close(logits.grad, case.tensor("grad"), 1e-5, "gradient")


@pytest.mark.parametrize("name", golden.cases("models", NETWORKS, "names"))
def test_the_network_has_the_published_tensors_and_settings(name):
    meta = golden.find("models", name).meta
    with torch.device("meta"):
        model = build(name, nc=meta["nc"])
        other = build(name, nc=3)
    assert [[k, list(v.shape)] for k, v in model.state_dict().items()] == meta["keys"]
    assert sum(p.numel() for p in model.parameters()) == meta["params"]
    assert len(model.plans) == meta["graph_nodes"]
    if "params_nc3" in meta:
        assert sum(p.numel() for p in other.parameters()) == meta["params_nc3"]
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert sorted({m.eps for m in norms}) == meta["bn_eps"]
    assert sorted({m.momentum for m in norms}) == meta["bn_momentum"]
    fused = model.fuse()
    assert sum(p.numel() for p in fused.parameters()) == meta["params_fused"]
    assert "keys_fused" not in meta or [[k, list(v.shape)] for k, v in fused.state_dict().items()] == meta["keys_fused"]


@pytest.mark.parametrize("name", golden.cases("models", WITH_OUTPUT))
@torch.no_grad()
def test_outputs_match_the_published_network(name):
    case = golden.find("models", name)
    model = golden.fill_(build(name, nc=case.meta["nc"]), case.meta["fill_g"]).eval()
    images = golden.image_array(0, (1, 3, 128, 160))
    for net in (model, model.fuse(), model.deploy()):
        golden.assert_close(net(images).main[0].flatten(1), case.tensor("logits"), 1e-5, "logits")
        golden.assert_close(net.predict(images).scores[:, 0], case.tensor("probs"), 1e-5, "probabilities")


@pytest.mark.parametrize("name", golden.cases("models", TRAINED))
def test_one_training_step(name):
    case = golden.find("models", name)
    args = case.meta["args"]
    model = golden.fill_(build(name, nc=args["nc"]), case.meta["fill_g"]).train()
    output = model(torch.cat([golden.image_array(i, (1, 3, *args["imgsz"])) for i in range(args["batch"])]))
    golden.assert_close(output.main[0].flatten(1), case.tensor("logits"), 1e-4, "logits")
    for i, layer in enumerate(case.meta["bn_checked"]):
        for statistic in ("running_mean", "running_var"):
            golden.assert_close(getattr(model.get_submodule(layer), statistic), case.tensor(f"bn_{i}_{statistic}"), 1e-4, statistic)
    (loss,) = model.head.build_loss(Hyperparameters())(output, batch_of(case.tensor("targets").long())).values()
    golden.assert_close(loss, case.tensor("loss_total").reshape(()), 1e-4, "loss")
    loss.backward()
    parameters = dict(model.named_parameters())
    golden.assert_close(next(iter(parameters.values())).grad, case.tensor("grad_first_param"), 1e-3, "first gradient")
    for key, norm in case.meta["param_grad_norms"].items():
        assert float(parameters[key].grad.norm()) == pytest.approx(norm, rel=3e-3, abs=1e-7), key


def test_the_best_five_and_the_accuracies_match():
    case = golden.find("ops", "top_k")
    logits, targets = case.tensor("logits"), case.tensor("targets")
    predictions = Predictions(torch.zeros(len(logits), 1, 4), logits.softmax(1)[:, None])
    found = CLASSIFY.postprocess(predictions, Suppression(conf=0.0))
    assert torch.stack([d.classes for d in found]).tolist() == case.tensor("pred5").tolist()
    metric = TopKMetric([str(i) for i in range(logits.shape[1])])
    batch = batch_of(targets)
    metric.update(CLASSIFY.to_original(found, batch.letterbox), CLASSIFY.ground_truth(batch), images=range(len(logits)))
    result = metric.compute()
    assert result.top1 == pytest.approx(float(case.arrays["top1"]), abs=1e-6)
    assert result.top5 == pytest.approx(float(case.arrays["top5"]), abs=1e-6)
    assert result.fitness == pytest.approx(float(case.arrays["fitness"]), abs=1e-6)


@pytest.mark.skipif(not golden.REFERENCE.is_dir(), reason="the reference folder is not at hand")
def test_the_recipe_is_the_published_one():
    """The part of the tasks' defaults that is about classification."""
    published = golden.find("ops", "defaults_" + "tasks").meta["args"]["defaults"]
    text = (HYPS / CLASSIFY.defaults.hyp).read_text(encoding="utf-8")
    ours = Hyperparameters.from_yaml(Path(HYPS / CLASSIFY.defaults.hyp))
    named = [line.split(":")[0] for line in text.splitlines() if line[:1].isalpha()]
    without_places = {"translate", "mosaic", "warmup_min_iters", "label_smoothing"}  # nothing to move in a whole image; only here
    for key in set(named) - without_places:
        assert getattr(ours, key) == published[key], key
    assert ours.label_smoothing == 0
