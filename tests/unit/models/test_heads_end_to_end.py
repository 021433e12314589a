"""Heads with a one-to-many and a one-to-one branch: which rows mean them, who learns from whom, and what deploying leaves."""

from __future__ import annotations

import copy

import pytest
import torch

from models import build_model
from models.heads.anchor_based import AnchorDetect
from models.heads.anchor_free import Detect, DetectV9, LightDetect
from models.heads.end_to_end import EndToEndDetect, LightEndToEndDetect
from models.losses.end_to_end import weights_at
from models.spec.channel_rules import HeadForm
from models.transfer.transfer import Source, transfer
from tests.golden import assert_close, fill_, image_array
from utils.config import Hyperparameters
from utils.errors import UserError
from utils.types import Batch, Letterbox, Predictions, Targets, to_unit_range

ROWS = {
    "backbone": [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 4]], [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "Conv", [32, 3, 2]]],
    "scales": {"n": [1.0, 1.0, 1024]},
    "scale": "n",
    "nc": 3,
}
HEADS = {
    "v10": {**ROWS, "head": [[[1, 2, 3], 1, "v10Detect", ["nc"]]]},
    "v26": {**ROWS, "end2end": True, "reg_max": 1, "head": [[[1, 2, 3], 1, "Detect", ["nc"]]]},
}


def built(name: str):
    return fill_(build_model(HEADS[name]), 1.0)


def batch() -> Batch:
    rows = torch.tensor([[0, 0, 0.5, 0.5, 0.6, 0.5], [1, 2, 0.3, 0.3, 0.4, 0.3], [1, 1, 0.7, 0.6, 0.3, 0.3]])
    none = Letterbox(torch.zeros(2, 2).long(), torch.ones(2, 2), torch.zeros(2, 2))
    images = (image_array(0, (2, 3, 64, 64)) * 255).to(torch.uint8)
    return Batch(images, Targets.of_rows(rows), ("a", "b"), none, 2)


def total(model, loss) -> torch.Tensor:
    return sum(loss(model(to_unit_range(batch().images)), batch()).values())


@pytest.mark.parametrize(
    ("anchors", "dialect", "form", "wanted"),
    [
        (None, "v8", HeadForm(), Detect),
        (None, "v9", HeadForm(), DetectV9),
        ([[1, 2]], "v5", HeadForm(), AnchorDetect),
        (None, "v8", HeadForm(light_classes=True), LightDetect),
        (None, "v8", HeadForm(end2end=True), EndToEndDetect),
        (None, "v8", HeadForm(end2end=True, light_classes=True), LightEndToEndDetect),
    ],
)
def test_a_row_means_the_head_of_its_file(anchors, dialect, form, wanted):
    assert Detect.for_row(anchors=anchors, dialect=dialect, form=form) is wanted


def test_the_keys_of_the_file_reach_the_head_and_the_saved_spec():
    model = build_model(HEADS["v26"])
    assert (type(model.head), model.head.reg_max) == (EndToEndDetect, 1)
    assert not any("dfl" in key for key in model.state_dict())
    again = build_model(model.spec.to_dict())
    assert again.spec.rows == model.spec.rows
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(("key", "value"), [("end2end", "yes"), ("reg_max", 0), ("reg_max", 65), ("reg_max", "16")])
def test_a_wrong_key_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=f"{key} should be"):
        build_model({**HEADS["v26"], key: value})


def test_unknown_branches_are_refused():
    with pytest.raises(UserError, match="branches 'one2on': unknown, did you mean 'one2one'"):
        EndToEndDetect(3, [16, 16, 16], branches="one2on")


def test_a_head_without_distribution_refuses_reg_max():
    anchored = {**ROWS, "anchors": 3, "reg_max": 1, "head": [[[1, 2, 3], 1, "IDetect", ["nc", "anchors"]]]}
    with pytest.raises(UserError, match="takes no reg_max"):
        build_model(anchored)


def test_both_branches_start_alike_with_weights_of_their_own():
    head = build_model(HEADS["v10"]).head
    for a, b in (("cv2", "one2one_cv2"), ("cv3", "one2one_cv3")):
        for ours, theirs in zip(getattr(head, a).parameters(), getattr(head, b).parameters(), strict=True):
            assert torch.equal(ours, theirs)
            assert ours is not theirs


@pytest.mark.parametrize("name", HEADS)
def test_only_the_one_to_many_branch_trains_the_layers_before_the_head(name):
    model = built(name).train()
    loss = model.head.build_loss(Hyperparameters())
    for epoch, weights in ((0, (0.8, 0.2)), (9, (0.1, 0.9))):
        loss.begin_epoch(epoch, 10)
        assert loss.branch_weights == pytest.approx(weights)
    loss.set_branch_weights((0.0, 1.0))
    total(model, loss).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.model[:-1].parameters())
    own = dict(model.head.named_parameters())
    assert all(own[k].grad.any() for k in own if k.startswith("one2one_cv3") and k.endswith("conv.weight"))
    assert any(own[k].grad.any() for k in own if k.startswith("one2one_cv2"))  # levels without a box have none
    model.zero_grad()
    loss.set_branch_weights(weights_at(0, 10))
    total(model, loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(p.grad.any() for p in model.model[:-1].parameters())


def test_gradients_reach_the_image_in_evaluation_mode():
    """Explanations read them from the branch that decodes."""
    model, images = built("v26").eval(), image_array(0, (1, 3, 64, 64)).requires_grad_()
    model(images).main[0].sum().backward()
    assert images.grad.any()


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_deploying_drops_a_branch_and_keeps_the_outputs_of_the_other(name):
    model, images = built(name).eval(), image_array(0, (2, 3, 64, 96))
    before = copy.deepcopy(model.state_dict())
    many, one = model(images).branches
    for for_suppression, wanted in ((False, one), (True, many)):
        lean = model.deploy(fuse=False, for_suppression=for_suppression)
        assert [torch.equal(a, b) for a, b in zip(lean(images).main, wanted)] == [True] * 3
        fused = model.deploy(for_suppression=for_suppression)
        assert len(fused.head.branch_weights) == 1
        for got, raw in zip(fused(images).main, wanted, strict=True):
            assert_close(got, raw, 1e-5)
        assert fused.predict(images).unique is not for_suppression
        own = {key.partition(".")[0] for key in lean.head.state_dict()}
        assert {key.startswith("one2one") for key in own - {"dfl"}} == {not for_suppression}
        again = build_model(fused.spec.to_dict())
        again.load_state_dict(fused.state_dict())
        assert torch.equal(again.eval().predict(images).scores, fused.predict(images).scores)
        assert again.deploy(for_suppression=not for_suppression).head.kept == fused.head.kept  # one branch is all there is
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_weights_of_a_head_with_one_branch_fill_both():
    single = fill_(build_model({**ROWS, "head": [[[1, 2, 3], 1, "Detect", ["nc"]]]}), 1.0)
    model = build_model({**ROWS, "end2end": True, "head": [[[1, 2, 3], 1, "Detect", ["nc"]]]})
    transfer(model, Source(single.state_dict(), single.spec.to_dict()))
    for branch in ("", "one2one_"):
        for part in ("cv2", "cv3"):
            for ours, theirs in zip(getattr(model.head, branch + part).parameters(), getattr(single.head, part).parameters(), strict=True):
                assert torch.equal(ours, theirs)


def test_suppression_is_for_predictions_of_several_networks():
    parts = [Predictions(torch.zeros(1, 2, 4), torch.zeros(1, 2, 3), unique=True)] * 2
    assert not Predictions.join_candidates(parts).unique
    assert Predictions.join_candidates(parts[:1]).unique
    assert parts[0][0].unique
    assert Predictions.cat(parts).unique
