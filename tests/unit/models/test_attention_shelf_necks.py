"""Whole necks and backbones of the shelf: shapes of every level, a gradient everywhere, and the rule for blending rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.build import build_model
from models.spec.registry import BLOCKS
from utils.errors import UserError


def levels(*widths: int) -> list[Tensor]:
    return [torch.rand(2, width, 32 // 2**i, 48 // 2**i) for i, width in enumerate(widths)]


@pytest.mark.parametrize(("name", "widths"), [("AFPNBody3", (8, 16, 24)), ("AFPNBody4", (8, 16, 24, 32)), ("AFPN", (32, 64, 96))])
def test_pyramids_keep_the_shape_of_each_level(name, widths):
    neck, maps = BLOCKS[name].cls(list(widths)), levels(*widths)
    out = neck(maps)
    assert [y.shape for y in out] == [x.shape for x in maps]
    sum(y.square().mean() for y in out).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_every_level_of_afpn_reaches_every_other():
    neck, maps = BLOCKS["AFPNBody3"].cls([8, 16, 24]).eval(), levels(8, 16, 24)
    for source in range(3):
        moved = [x + (i == source) for i, x in enumerate(maps)]
        assert all((a - b).abs().max() > 0 for a, b in zip(neck(maps), neck(moved)))


@pytest.mark.parametrize(("name", "strides"), [
    ("FasterNet", (4, 8, 16, 32)), ("EfficientRep", (4, 8, 16, 32)), ("ShuffleNetV2", (8, 16, 32)), ("VanillaNet", (8, 16, 32)),
])  # fmt: skip
def test_whole_backbones_give_a_map_a_stage(name, strides):
    maps = BLOCKS[name].cls()(torch.rand(2, 3, 64, 96))
    assert [tuple(y.shape[2:]) for y in maps] == [(64 // s, 96 // s) for s in strides]


@pytest.mark.parametrize("row", [[[0, 1], 1, "BiFPN", []], [[1], 1, "ASFF2", []]])
def test_inputs_that_cannot_be_fused_are_refused(row):
    rows = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]], row]
    with pytest.raises(UserError, match=r"row 2 \[.*\]: blends two or more inputs of one width"):
        build(rows)


def test_whole_backbone_is_refused_as_a_row():
    with pytest.raises(UserError, match=r"yolov8-FasterNet\.yaml"):
        build([[-1, 1, "FasterNet", []]])


def build(rows: list) -> None:
    head = [[[len(rows) - 1], 1, "Detect", ["nc"]]]
    build_model({"nc": 2, "scales": {"n": [1.0, 1.0, 1024]}, "backbone": rows, "head": head})
