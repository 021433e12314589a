"""Parameter groups of whole networks against the published ones: tensors and scalars of each group."""

from __future__ import annotations

import pytest

from engine.training.optim import parameter_groups
from models import build_model
from tests.golden import find

# name of the published group -> ours
OURS = {"bias": "bias", "decay": "decay", "weight": "decay", "no_decay": "no_decay", "bn": "no_decay"}
PUBLISHED = find("ops", "optimizer_groups").meta["groups"]
SMALL = ("gelan-t", "yolov9-t", "yolov8n", "yolov8s", "ultralytics-yolov9t")
LARGE = ("gelan-c", "yolov9-c", "yolov9-e")


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_parameter_groups_match_the_published_ones(name):
    golden = PUBLISHED[name]
    model = build_model(f"{name.removeprefix('ultralytics-')}.yaml")
    groups = parameter_groups(model)
    fixed = [p for p in model.parameters() if not p.requires_grad]  # the projection of the box distribution, counted as decayed there
    groups["decay"] += fixed

    mine = {group: (len(members), sum(p.numel() for p in members)) for group, members in groups.items()}
    theirs = {OURS[group]: (t, n) for group, t, n in zip(golden["order"], golden["tensors"], golden["params"])}
    assert mine == theirs


def test_every_trainable_parameter_of_a_network_is_in_exactly_one_group():
    model = build_model("yolov9-t-FocalModulation.yaml")
    ids = [id(p) for group in parameter_groups(model).values() for p in group]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
