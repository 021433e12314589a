"""Every published config gives the published network: parameter names, shapes and counts, with three classes too, and after folding."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from models import build_model
from models.model import Model
from models.spec.config_files import CONFIGS
from models.spec.parser import load_spec
from models.spec.planning import plan_layers
from tests.golden import HERE, all_names, cases, find

NO_CONFIG = ("train_", "deploy_maps", "baseline-")
FOLDERS = ("v5", "v7", "v8", "v9", "v10", "v11", "v12", "v26", "rtdetr")
PUBLISHED = sorted(p for folder in FOLDERS for p in (CONFIGS / folder).glob("*.yaml"))
CASES = [name for name in all_names("models") if not name.startswith(NO_CONFIG) and not name.endswith("-cls")]
SLOW = [name for name in CASES if not (HERE / "models" / f"{name}.npz").is_file()]  # the kept ones cover every family


def config_of(name: str) -> str:
    """``ultralytics-yolov9c`` -> ``yolov9c.yaml``."""
    return re.sub(r"^(ultralytics-|hub-v5-|hub-v9-)", "", name.removesuffix(".yaml")) + ".yaml"


def build(name: str, nc: int) -> Model:
    """The network with shapes but no memory."""
    with torch.device("meta"):
        return build_model(config_of(name), nc=nc)


def keys_of(model: nn.Module) -> list[list[object]]:
    return [[key, list(value.shape)] for key, value in model.state_dict().items()]


def published(meta: dict, which: str) -> list[list[object]]:
    """The published names, less the copy of the anchors in px that YOLOv7 keeps also in a plain Detect."""
    return [k for k in meta[which] if not (meta["head"] == "Detect" and k[0].endswith("anchor_grid"))]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", cases("models", CASES, "names", slow=SLOW))
def test_state_dict_keys_and_shapes_match_the_published_network(name: str) -> None:
    meta = find("models", name).meta
    model = build(name, meta["nc"])
    assert keys_of(model) == published(meta, "keys")
    assert count(model) == meta["params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == meta["trainable"]
    strides = list(model.strides)
    assert meta["stride"] == (strides[-1:] if meta.get("task") == "rtdetr" else strides)  # of RT-DETR the coarsest alone is named
    assert len(model.plans) == meta["graph_nodes"]
    activations = {type(m).__name__ for m in model.modules() if isinstance(m, (nn.SiLU, nn.ReLU, nn.LeakyReLU))}
    assert activations == set(meta["activations"]) - {"MultiheadAttention", "GELU"}  # AIFI calls its GELU as a function
    if "keys_fused" in meta:
        check_fused(model, meta)
    assert count(build(name, 3)) == meta["params_nc3"]


def check_fused(model: Model, meta: dict) -> None:
    """The fused network has the published names, and with two branches so has the deployed one; the network itself is left alone."""
    fused = model.deploy(for_suppression=True) if "branches" in meta else model.fuse()  # the published fuse() keeps one branch
    assert keys_of(fused) == published(meta, "keys_fused")
    assert count(fused) == meta["params_fused"]
    if "branches" in meta:
        one = model.deploy()
        assert (len(one.state_dict()), count(one)) == (meta["keys_fused_end2end_count"], meta["params_fused_end2end"])
    assert keys_of(model) == published(meta, "keys"), "fuse() changed the network it was called on"


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_published_config_is_planned(path: Path) -> None:
    """Also those without a vector of their own: every row's module is known and its widths fit."""
    plans = plan_layers(load_spec(path))
    read = {s for plan in plans for s in plan.sources}
    unread = [plan.index for plan in plans[:-1] if plan.index not in read]
    assert not unread, f"rows {unread} are read by no other"


@pytest.mark.slow
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_published_config_builds(path: Path) -> None:
    assert count(build(path.name, 2)) > 1e6
