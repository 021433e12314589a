"""Options that published constructors and rows of other programs have: each is read as meant there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model
from models.layers.attention.bilevel_routing import BiLevelRoutingAttention
from models.layers.attention.cbam import CBAM, POOLS
from models.layers.attention.dat import DATAttention
from models.layers.attention.ops.routing import adaptive_max
from models.spec.registry import BLOCKS
from tests.golden import assert_close, fill_
from tests.unit.models.test_row_arguments import complaint, planned
from utils.errors import UserError


@pytest.mark.parametrize(("args", "placed", "named"), [
    ([7], (256,), {"kernel_size": 7}),
    ([256, 7], (256,), {"kernel_size": 7}),
    ([256, 256, 3], (256,), {"kernel_size": 3}),
    ([256, 16, 7], (256, 16), {"kernel_size": 7}),
    ([16, 7], (256, 16), {"kernel_size": 7}),
    ([256, 16], (256, 16), {}),
    ([8], (256, 8), {}),
    ([256], (256,), {}),
    ([], (256,), {}),
    ([16, ["avg", "lse"], True], (256, 16, ["avg", "lse"], True), {}),
])  # fmt: skip
def test_cbam_rows_of_other_programs(args, placed, named):
    assert planned("CBAM", args) == (placed, named)


def test_kernel_written_at_an_insertion_is_no_reduction():
    seven, plain = (build_model("yolov8n.yaml", nc=2, attention=[text]).model[10] for text in ("CBAM@9(3)", "CBAM@9"))
    shapes = [{key: tuple(value.shape) for key, value in module.state_dict().items()} for module in (seven, plain)]
    assert shapes[0].pop("SpatialGate.spatial.conv.weight") == (1, 2, 3, 3)
    assert shapes[1].pop("SpatialGate.spatial.conv.weight") == (1, 2, 7, 7)
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("args", "placed"), [([256, 16, 4], None), ([256, 16, 8], None), ([16, 8], (256, 8)), ([256, 4], (256, 4))])
def test_shuffle_attention_rows_of_other_programs(args, placed):
    assert planned("ShuffleAttention", args)[0] == (placed or (256, args[-1]))


@pytest.mark.parametrize("name", ["iRMB", "ACmix", "BottleneckTransformer", "TransformerBlock", "BoTPaperBlock", "BoT3", "C3TR"])
def test_width_written_twice_is_in_and_out(name):
    assert planned(name, [256, 256]) == planned(name, [256])


def test_two_widths_that_are_not_the_inputs_are_refused():
    assert "norm_in should be True or False, not 128" in complaint(("iRMB", [128, 128]))


@pytest.mark.parametrize(("name", "exact"), [
    ("lp", lambda x: F.lp_pool2d(x, 2, x.shape[-2:])), ("lse", lambda x: x.exp().sum((2, 3), keepdim=True).log()),
])  # fmt: skip
def test_pools_of_cbam(name, exact):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert_close(POOLS[name](x), exact(x), 1e-6)


def test_pools_of_cbam_are_finite_with_their_gradients():
    for x in (torch.zeros(1, 16, 3, 3), torch.full((1, 16, 3, 3), 300.0), torch.full((1, 16, 40, 40), 20.0).half()):
        x.requires_grad_()
        module = fill_(CBAM(16, 4, ["lp", "lse"])).to(x.dtype).eval()
        y = module.ChannelGate(x)
        y.float().sum().backward()
        assert torch.isfinite(y).all()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("pools", [[], ["avg", "median"], "avg"])
def test_unknown_pools_are_refused(pools):
    with pytest.raises(ValueError, match="pool_types should be a list of avg, max, lp, lse"):
        CBAM(16, pool_types=pools)


@pytest.mark.parametrize(("size", "bins"), [(7, 1), (7, 3), (2, 4), (8, 4)])
def test_adaptive_max_is_torchs(size, bins):
    x = torch.randn(2, size, 3)
    expected = F.adaptive_max_pool1d(x.transpose(1, 2), bins).transpose(1, 2)
    assert torch.equal(adaptive_max(x, size, bins), expected)


@pytest.mark.parametrize("size", [(3, 20), (9, 12), (1, 1)])
def test_adaptive_max_pooling_accepts_any_map(size):
    module = fill_(BiLevelRoutingAttention(16, 2, 4, kv_downsample_mode="ada_maxpool", kv_per_win=2)).eval()
    x = torch.randn(1, 16, *size)
    assert module(x).shape == x.shape


def test_fixed_positions_are_resized_to_other_maps():
    module = fill_(DATAttention(16, 2, q_size=8, fixed_pe=True)).eval()
    assert module.rpe_table.shape == (2, 64, 16)
    for size in ((8, 8), (5, 9), (16, 16), (1, 1)):
        x = torch.randn(2, 16, *size)
        assert module(x).shape == x.shape
    table = module.rpe_table.data
    table.copy_(torch.arange(2.0).view(2, 1, 1).expand_as(table))
    query, position = torch.zeros(2, 16, 5, 9), torch.zeros(2, 1, 3, 5, 2)
    assert_close(module._fixed_bias(query, position), torch.arange(2.0).view(1, 2, 1, 1).expand(1, 2, 45, 15), 1e-6)


@pytest.mark.parametrize(("name", "options"), [
    ("LKA", {"dim": 8}), ("LKA", {"d_model": 8}),
    ("PConv", {"dim": 8, "forward": "slicing"}), ("PConv", {"dim": 8, "forward": "split_cat"}),
    ("iRMB", {"dim_in": 8, "dim_out": 8, "act_layer": "hswish", "norm_layer": "ln_2d", "dim_head": 4, "v_group": True}),
    ("DilateBlock", {"dim": 12, "num_heads": 3, "qk_scale": 0.5}), ("BiFormerBlockNCHW", {"dim": 8, "norm_layer": "BatchNorm2d"}),
    ("BottleRep", {"in_channels": 8, "out_channels": 8}),
])  # fmt: skip
def test_published_options_are_accepted_and_trained(name, options):
    module = fill_(BLOCKS[name].cls(**options)).train()
    x = torch.randn(2, next(iter(options.values())), 6, 7)
    y = module(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(("name", "options", "message"), [
    ("LKA", {}, "one width is expected"), ("LKA", {"dim": 8, "d_model": 4}, "one width is expected"),
    ("PConv", {"dim": 8, "forward": "fast"}, "neither 'split_cat' nor 'slicing'"),
    ("YOLOv6RepBlock", {"in_channels": 8, "out_channels": 8, "block": "Rep"}, "known are block"),
    ("BiFormerBlockNCHW", {"dim": 8, "norm_layer": "GroupNorm"}, "LayerNorm2d, BatchNorm2d"),
    ("iRMB", {"dim_in": 8, "dim_out": 8, "norm_layer": "gn"}, "known are norm_layer"),
])  # fmt: skip
def test_other_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        BLOCKS[name].cls(**options)


def test_ghost_is_the_ghost_bottleneck():
    assert BLOCKS["Ghost"] is BLOCKS["GhostBottleneck"]


@pytest.mark.parametrize(("args", "built"), [
    ([512, 4, 2, 1, 0, 512], (128, 128, 4, 2, 1, 0, 128)),  # one group a channel
    ([512, 4, 2, 1, 0, 4], (128, 128, 4, 2, 1, 0, 4)),
    ([128, 128, 2, 2], (128, 128, 2, 2)),  # widths in and out
    ([512, 512, 2, 2], (128, 128, 2, 2)),
    ([256, 2, 2, 0], (128, 64, 2, 2, 0)),
])  # fmt: skip
def test_transposed_convolutions_of_other_programs(args, built):
    rows = [[-1, 1, "Conv", [512, 3, 2]], [-1, 1, "nn.ConvTranspose2d", args]]
    model = build_model({"nc": 2, "width_multiple": 0.25, "backbone": rows, "head": [[[0, 1], 1, "Detect", ["nc"]]]})
    layer = model.model[1]
    assert isinstance(layer, nn.ConvTranspose2d)
    assert model.plans[1].args == built


def test_grouped_transposed_convolution_by_name():
    layer = BLOCKS["DWConvTranspose2d"].cls(12, 8, 4, 2, 1)
    assert layer.groups == 4
    assert layer(torch.zeros(1, 12, 5, 6)).shape == (1, 8, 10, 12)


def test_groups_that_do_not_divide_are_named():
    rows = [[-1, 1, "Conv", [64, 3, 2]], [-1, 1, "nn.ConvTranspose2d", [64, 4, 2, 1, 0, 48]]]
    with pytest.raises(UserError, match=r"row 1 \[nn.ConvTranspose2d\].*divisible by groups"):
        build_model({"nc": 2, "backbone": rows, "head": [[[0, 1], 1, "Detect", ["nc"]]]})
