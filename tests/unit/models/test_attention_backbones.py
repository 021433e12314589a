"""Published backbones as rows: the rows with published weights give the maps of the whole network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models.backbones import biformer, cloformer, focalnet
from models.backbones.botnet import BoTNetStage
from models.backbones.whole import ramp
from models.build import build_model
from models.spec.registry import BLOCKS
from tests.golden import fill_
from utils.errors import UserError


def same_maps(whole: nn.Module, rows: list[nn.Module], mapped: dict[str, torch.Tensor], maps: list[int]) -> None:
    """Loads ``mapped`` into the rows and compares the outputs of rows ``maps`` with the network's."""
    network = nn.Module()
    network.model = nn.Sequential(*rows)
    network.load_state_dict(mapped)
    whole.eval(), network.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, got = whole(x), []
        for row in network.model:
            got.append(row(x if not got else got[-1]))
    assert len(expected) == len(maps)
    assert all(torch.allclose(got[i], e, atol=1e-5) for i, e in zip(maps, expected))


@pytest.mark.parametrize("overlap", [False, True])
def test_focalnet_rows(overlap):
    whole = fill_(focalnet.FocalNetBackbone(embed_dim=8, depths=(1, 2), focal_levels=(2, 3), focal_windows=(3, 5), num_classes=4,
                                            use_conv_embed=overlap, use_layerscale=True))  # fmt: skip
    rows = [focalnet.FocalNetStage(3, 8, 1, 4, conv_embed=overlap, use_layerscale=True),
            focalnet.FocalNetStage(8, 16, 2, 2, 3, 5, conv_embed=overlap, use_layerscale=True)]  # fmt: skip
    same_maps(whole, rows, focalnet.rows_from_published(whole.state_dict()), [0, 1])


def test_biformer_rows():
    whole = fill_(biformer.BiFormerBackbone((1, 2), (8, 16), topks=(2, -2), head_dim=4, n_win=2, num_classes=4))
    rows = [biformer.BiFormerStage(3, 8, 1, 2, 4, head_dim=4, n_win=2), biformer.BiFormerStage(8, 16, 2, -2)]
    same_maps(whole, rows, biformer.rows_from_published(whole.state_dict()), [0, 1])


def test_cloformer_rows():
    whole = fill_(cloformer.CloFormerBackbone(embed_dims=(8, 16), depths=(2, 1), num_heads=(2, 4), group_splits=((1, 1), (2, 2)),
                                              kernel_sizes=((3,), (5,)), window_sizes=(4, 1), num_classes=4))  # fmt: skip
    rows = [cloformer.CloFormerStem(3, 8), cloformer.CloFormerStage(8, 16, 2, 2, (1, 1), (3,), 4),
            cloformer.CloFormerStage(16, 16, 1, 4, (2, 2), (5,), 1, stride=1)]  # fmt: skip
    same_maps(whole, rows, cloformer.rows_from_published(whole.state_dict()), [0, 1, 2])


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (lambda: focalnet.FocalNetBackbone(num_classes=1000), 28.4),
        (lambda: focalnet.FocalNetBackbone(num_classes=1000, focal_levels=(3, 3, 3, 3)), 28.6),
        (lambda: biformer.BiFormerBackbone(num_classes=1000), 13.1),
        (lambda: cloformer.CloFormerBackbone(num_classes=1000), 4.2),
    ],
)
def test_published_sizes(build, millions):
    """Parameters as the papers' tables give them."""
    with torch.device("meta"):
        count = sum(p.numel() for p in build().parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(("stride", "size"), [(2, (4, 5)), (1, (7, 9))])
def test_botnet_stage(stride, size):
    stage = BoTNetStage(8, 16, 2, stride, heads=2, dim_head=4)
    assert stage(torch.randn(2, 8, 7, 9)).shape == (2, 16, *size)


@pytest.mark.parametrize("name", ["FocalNetBackbone", "BiFormerBackbone", "CloFormerBackbone"])
def test_whole_network_is_refused_as_a_row(name):
    assert name in BLOCKS
    config: dict[str, Any] = {"nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "backbone": [[-1, 1, name, []]], "head": []}
    with pytest.raises(UserError, match="stages as rows"):
        build_model(config)


def test_ramp_is_linear():
    assert ramp(0.0, 0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert ramp(0.2, 0.5, 1) == [0.2]
    assert ramp(0.2, 0.5, 0) == []
