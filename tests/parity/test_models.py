"""Whole networks against the reference: outputs of filled models, fused outputs, strides, initial biases, and deployment."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from tasks import DETECT
from tests.golden import all_names, assert_close, cases, fill_, find, image_array
from utils.boxes import xyxy_to_cxcywh
from utils.nms import Suppression

WHOLE = [n for n in all_names("models") if not n.startswith(("train_", "deploy_", "baseline-")) and not n.endswith("-cls")]


def has_output(name: str) -> bool:
    """Whether a vector holds outputs of a network without anchors; test_heads_in_models.py compares those of the others."""
    golden = find("models", name)
    decoded = golden.arrays.get("decoded")
    if name.endswith("-obb"):
        return False  # in test_obb.py
    return bool(golden.arrays) and (decoded is None or decoded.shape[-1] != golden.meta["nc"] + 5)


WITH_OUTPUT = [n for n in WHOLE if has_output(n)]
END_TO_END = [n for n in WITH_OUTPUT if "end2end" in find("models", n).arrays]
BRANCHES = (("aux", "main"), ("one2many", "one2one"))  # how the vectors of heads with two branches call them
DEPLOYED = ("t", "s", "m", "c", "e")


def built(name: str, **options):
    meta = find("models", name).meta
    return build_model(meta["config"], nc=meta["nc"], **options).eval()


def decoded_parts(model, output):
    """Boxes (1, 4, N) cxcywh px, scores (1, nc, N) and what a task adds, the reference's layout."""
    predictions = model.head.decode(output)
    parts = (xyxy_to_cxcywh(predictions.boxes), predictions.scores, *predictions.fields.values())
    return [part.transpose(1, 2) for part in parts]


def check_decoded(parts, reference, what):
    wanted = reference.split([part.shape[1] for part in parts], dim=1)
    for name, part, other in zip(("boxes", "scores", "fields"), parts, wanted):
        assert_close(part, other, 1e-4, f"{what} {name}")


@pytest.mark.parametrize("name", cases("models", WITH_OUTPUT))
@torch.no_grad()
def test_outputs_match_the_published_network(name):
    golden = find("models", name)
    model = fill_(built(name), golden.meta["fill_g"])
    images = image_array(0, (1, 3, 128, 160))
    branches = next((names for names in BRANCHES if f"raw_{names[-1]}_0" in golden.arrays), ("",))
    for variant, net in (("plain", model), ("fused", model.fuse())):
        output = net(images)
        for branch, maps in zip(branches, output.branches, strict=True):
            for level, raw in enumerate(maps):
                key = "_".join(filter(None, ("raw", branch, str(level))))
                assert_close(raw, golden.tensor(key), 1e-5, f"{name} {variant} {key}")
        reference = golden.tensor("_".join(filter(None, ("decoded", branches[-1]))))
        parts = decoded_parts(net, output)
        if branches[-1] == "one2one":  # the published layout of this branch has corners
            reference = torch.cat((xyxy_to_cxcywh(reference[:, :4].transpose(1, 2)).transpose(1, 2), reference[:, 4:]), dim=1)
        check_decoded(parts, reference, f"{name} {variant}")


@pytest.mark.parametrize("name", cases("models", END_TO_END))
@torch.no_grad()
def test_detections_and_both_deployed_branches_match_the_published_network(name):
    golden = find("models", name)
    model = fill_(built(name), golden.meta["fill_g"])
    images = image_array(0, (1, 3, 128, 160))
    wanted, stable = golden.tensor("end2end")[0], golden.tensor("end2end_stable").bool()  # (300, 6) xyxy, score, class
    (found,) = DETECT.postprocess(model.deploy().predict(images), Suppression(conf=-1.0))
    assert_close(found.scores, wanted[:, 4], 1e-4, "scores")
    assert_close(found.boxes[stable], wanted[stable, :4], 1e-4, "boxes")
    assert torch.equal(found.classes[stable], wanted[stable, 5].long())
    if "decoded_one2many" in golden.arrays:
        net = model.deploy(for_suppression=True)
        check_decoded(decoded_parts(net, net(images)), golden.tensor("decoded_one2many"), f"{name} one2many")


WITH_BIASES = [n for n in all_names("models") if n.startswith(("gelan", "yolov9")) and "seg" not in n]


@pytest.mark.parametrize("name", cases("models", WITH_BIASES, "biases"))
def test_strides_and_initial_biases_match_the_published_network(name):
    meta = find("models", name).meta
    model = built(name)
    assert list(model.strides) == meta["stride"]
    biases = {k: v for k, v in model.state_dict().items() if k in meta["head_bias_init"]}
    assert set(biases) == set(meta["head_bias_init"])
    for key, value in biases.items():
        assert value[-1].item() == pytest.approx(meta["head_bias_init"][key], abs=1e-5)
        assert (value == value[-1]).all()


@pytest.mark.parametrize("scale", [pytest.param(s, marks=() if s in "tc" else pytest.mark.slow) for s in DEPLOYED])
@pytest.mark.parametrize("variant", ["", "-FocalModulation"])
@torch.no_grad()
def test_deploying_drops_the_auxiliary_branch(scale, variant):
    """yolov9-X becomes gelan-X key for key, with the outputs of its main branch; with attention in it likewise."""
    model = fill_(build_model(f"yolov9-{scale}{variant}.yaml").eval(), 1.35)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lean, fused = model.deploy(fuse=False), model.deploy()
    images = image_array(0, (1, 3, 128, 160))
    main = model(images).main
    for got, want in zip(lean(images).main, main, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(fused(images).main, main, strict=True):
        assert_close(got, want, 1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the old one is left alone
    assert torch.equal(lean.predict(images).boxes, model.predict(images).boxes)

    gelan = _gelan_keys(scale)
    attention = {i for i, p in enumerate(lean.plans) if p.name == "FocalModulation"}
    assert len(attention) == (1 if variant else 0)
    for net, keys in ((lean, gelan["keys"]), (fused, gelan["keys_fused"])):
        assert [[k, list(v.shape)] for k, v in _without(net.state_dict(), attention).items()] == keys


def _gelan_keys(scale):
    """Keys and shapes of gelan-X, plain and fused: the reference's, or where it has none (s) those of the published rows."""
    try:
        return find("models", f"gelan-{scale}").meta
    except FileNotFoundError:
        net = build_model(f"gelan-{scale}.yaml")
        states = {"keys": net.state_dict(), "keys_fused": net.fuse().state_dict()}
        return {key: [[k, list(v.shape)] for k, v in state.items()] for key, state in states.items()}


def _without(state, rows):
    """The entries of a state dict but those of some rows, later rows moved down."""
    out = {}
    for key, value in state.items():
        head, row, rest = key.split(".", 2)
        if int(row) not in rows:
            out[f"{head}.{int(row) - sum(r < int(row) for r in rows)}.{rest}"] = value
    return out


@pytest.mark.parametrize("scale", DEPLOYED)
def test_deploy_key_map_matches_the_reference(scale):
    """The layers that deployment keeps, and their new rows, are those of the published map."""
    try:
        maps = find("models", "deploy_maps_yolov9_to_gelan").meta["maps"][scale]
    except FileNotFoundError:
        pytest.skip("needs the deploy maps")
    model = build_model(f"yolov9-{scale}.yaml")
    fill_(model)
    lean = model.deploy(fuse=False)
    moved = {i: i + shift for first, last, shift in maps["layers"] for i in range(first, last + 1)}
    old, new = model.state_dict(), lean.state_dict()
    for key, value in old.items():
        _, row, rest = key.split(".", 2)
        if int(row) in moved:
            assert torch.equal(new[f"model.{moved[int(row)]}.{rest}"], value)
    assert len(lean.plans) == maps["detect"][1] + 1


def test_a_deployed_spec_builds_the_same_network_again():
    fused = build_model("yolov9-t-FocalModulation.yaml", nc=3).deploy()
    again = build_model(fused.spec.to_dict())
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in fused.state_dict().items()}
