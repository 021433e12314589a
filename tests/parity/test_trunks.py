"""Rows before the head of YOLOv10, YOLO11, YOLO12 and YOLO26: names and shapes of every size, plain and fused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import build_model
from models.layers.c3k import C3k
from models.layers.csp import Bottleneck
from models.model import Model
from models.spec.config_files import find_config
from tests.golden import REFERENCE, find
from utils.reading.yaml_text import read_yaml

FAMILIES = {"yolov10": "nsmblx", "yolo11": "nsmlx", "yolo12": "nsmlx", "yolo26": "nsmlx"}
SIZES = [f"{family}{size}" for family, sizes in FAMILIES.items() for size in sizes]
HEAD_KEYS = ("end2end", "reg_max")


def trunk_of(config: str) -> Model:
    """The network of a config with a plain head in place of its own; shapes but no memory."""
    path, scale = find_config(config)
    data = {key: value for key, value in read_yaml(path, expected="keys").items() if key not in HEAD_KEYS}
    source, number, _, _ = data["head"][-1]
    data |= {"scale": scale or next(iter(data["scales"])), "head": [*data["head"][:-1], [source, number, "DDetect", ["nc"]]]}
    with torch.device("meta"):
        return build_model({**data, "dialect": "v8"})


def tensors(network: nn.Module, last: int) -> list[list]:
    return published([[key, list(value.shape)] for key, value in network.state_dict().items()], last)


def published(keys: list[list], last: int) -> list[list]:
    """Names and shapes of the rows before the last one."""
    return [[key, shape] for key, shape in keys if int(key.split(".")[1]) < last]


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference folder is not at hand")
@pytest.mark.parametrize("size", [size if size.endswith("n") else pytest.param(size, marks=pytest.mark.slow) for size in SIZES])
def test_rows_before_the_head_have_the_published_names_and_shapes(size):
    meta = find("models", f"ultralytics-{size}").meta
    network = trunk_of(size)
    last = len(network.plans) - 1
    assert len(network.plans) == meta["graph_nodes"]
    assert list(network.strides) == meta["stride"]
    assert tensors(network, last) == published(meta["keys"], last)
    assert tensors(network.fuse(), last) == published(meta["keys_fused"], last)


@pytest.mark.parametrize("config", [*SIZES, *(f"yolo26{size}-{form}" for size in "nsmlx" for form in ("p2", "p6"))])
def test_every_size_is_found_by_its_name(config):
    path, letter = find_config(config)
    assert letter in read_yaml(path, expected="keys")["scales"] if letter else path.stem == config


@pytest.mark.parametrize(("form", "strides"), [("p2", [4, 8, 16, 32]), ("p6", [8, 16, 32, 64])])
def test_yolo26_has_forms_with_a_finer_and_a_coarser_level(form, strides):
    network = trunk_of(f"yolo26s-{form}")
    assert network.spec.scale == "s"
    assert list(network.strides) == strides


def test_the_forms_that_blocks_have_at_some_scales_only():
    small, large = trunk_of("yolo12s"), trunk_of("yolo12l")
    assert isinstance(small.model[2].m[0], Bottleneck)
    assert isinstance(large.model[2].m[0], C3k)
    assert small.model[6].gamma is None
    assert large.model[6].gamma is not None
    assert [net.model[6].m[0][0].mlp[0].conv.out_channels for net in (small, large)] == [256, int(1.2 * 256)]
