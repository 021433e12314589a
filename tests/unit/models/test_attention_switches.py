"""Every constructor option of part A and B modules does what it says: it changes the result, the parameters or the gradients."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.layers.attention.cloformer import CloAttention, ConvFFN
from models.layers.attention.dat import DATAttention
from models.layers.attention.dilateformer import MSDA, DilateBlock
from models.layers.attention.emo import iRMB
from models.layers.attention.focalnet import FocalModulation
from models.layers.attention.ops.neighbourhood import Neighbourhood, neighbourhood_attention
from models.layers.attention.swin import SwinBlock, SwinWindowAttention
from models.spec.registry import BLOCKS
from tests.golden import assert_close, fill_
from tests.unit.models.test_attention_options import Rule, batch_normed, check, gelu, point, spread

WIDTH = 8
# module: arguments that come first, and for each option another value than the default, with what it needs beside it
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "BiLevelRoutingAttention": ({"dim": WIDTH, "num_heads": 2, "n_win": 2, "topk": 2}, {
        "num_heads": 4, "n_win": 3, "qk_dim": 4, "qk_scale": 2.0, "kv_per_win": (1, {"kv_downsample_mode": "ada_avgpool"}),
        "kv_downsample_ratio": (2, {"kv_downsample_mode": "avgpool"}), "kv_downsample_kernel": (3, {"kv_downsample_mode": "maxpool"}),
        "kv_downsample_mode": "ada_maxpool", "topk": 1, "param_attention": "qkv", "param_routing": (True, {"soft_routing": True}),
        "diff_routing": (True, {"soft_routing": True}), "soft_routing": True, "side_dwconv": 0,
    }),
    "nchwBRA": ({"dim": WIDTH, "num_heads": 2, "n_win": 2, "topk": 2}, {
        "num_heads": 4, "n_win": 3, "qk_scale": 2.0, "topk": 1, "side_dwconv": 5,
    }),
    "BiFormerBlock": ({"dim": WIDTH, "num_heads": 2, "n_win": 2, "topk": 2}, {
        "num_heads": 4, "topk": -1, "drop_path": 0.5, "layer_scale_init_value": 0.1, "mlp_ratio": 2.0, "mlp_dwconv": True,
        "side_dwconv": 3, "before_attn_dwconv": 0, "pre_norm": False, "kv_downsample_mode": "identity", "qk_scale": 2.0,
    }),
    "BiFormerBlockNCHW": ({"dim": WIDTH, "num_heads": 2, "n_win": 2, "topk": 2}, {
        "num_heads": 4, "n_win": 3, "topk": -1, "mlp_ratio": 2.0, "side_dwconv": 3, "drop_path": 0.5, "norm_layer": "BatchNorm2d",
    }),
    "FocalModulation": ({"dim": WIDTH}, {
        "focal_window": 5, "focal_level": 1, "focal_factor": 4, "bias": False, "proj_drop": 0.5, "use_postln_in_modulation": True,
        "normalize_modulator": True,
    }),
    "FocalModulationBlock": ({"dim": WIDTH}, {
        "mlp_ratio": 2.0, "drop": 0.5, "drop_path": 0.5, "focal_level": 1, "focal_window": 5, "use_layerscale": True,
        "layerscale_value": (0.5, {"use_layerscale": True}), "use_postln": True, "use_postln_in_modulation": True,
        "normalize_modulator": True,
    }),
    "CloAttention": ({"dim": WIDTH, "num_heads": 4}, {
        "num_heads": 8, "group_split": [1, 3], "kernel_sizes": [3], "window_size": 2, "attn_drop": 0.5, "proj_drop": 0.5, "qkv_bias": False,
    }),
    "ConvFFN": ({"in_channels": WIDTH}, {"hidden_channels": 5, "kernel_size": 3, "stride": 2, "out_channels": 3, "drop_out": 0.5}),
    "CloBlock": ({"dim": WIDTH, "num_heads": 4}, {
        "out_dim": (4, {"stride": 2}), "num_heads": 8, "group_split": [1, 3], "kernel_sizes": [3], "window_size": 2, "mlp_kernel_size": 3,
        "mlp_ratio": 2.0, "stride": 2, "attn_drop": 0.5, "mlp_drop": 0.5, "qkv_bias": False, "drop_path": 0.5,
    }),
    "NLBlockND": ({"in_channels": WIDTH}, {
        "inter_channels": 3, "mode": "dot", "dimension": 3, "bn_layer": False, "sub_sample": True,
    }),
    "MHSA": ({"n_dims": WIDTH}, {
        "width": (5, {"pos_emb": True}), "height": (5, {"pos_emb": True}), "heads": 2, "pos_emb": True,
    }),
    "BottleneckTransformer": ({"c1": WIDTH, "c2": WIDTH}, {
        "stride": 2, "heads": 2, "mhsa": False, "resolution": [5, 5], "pos_emb": False,
    }),
    "BoT3": ({"c1": WIDTH, "c2": WIDTH}, {"n": 2, "e": 1.0, "w": 5, "h": 5, "pos_emb": False}),
    "BoTPaperAttention": ({"dim": WIDTH}, {"fmap_size": [5, 5], "heads": 2, "dim_head": 3, "rel_pos_emb": False}),
    "BoTPaperBlock": ({"dim": WIDTH}, {
        "dim_out": 12, "fmap_size": [5, 5], "proj_factor": 2, "downsample": True, "heads": 2, "dim_head": 3, "rel_pos_emb": False,
    }),
    "MSDA": ({"dim": 12, "num_heads": 6}, {
        "num_heads": 3, "qkv_bias": True, "qk_scale": 2.0, "kernel_size": 5, "dilation": [1, 3, 2], "attn_drop": 0.5, "proj_drop": 0.5,
    }),
    "DilateBlock": ({"dim": 12, "num_heads": 6}, {
        "num_heads": 3, "mlp_ratio": 2.0, "qkv_bias": True, "qk_scale": 2.0, "drop": 0.5, "attn_drop": 0.5, "drop_path": 0.5,
        "kernel_size": 5, "dilation": [1, 3, 2], "cpe_per_block": True,
    }),
    "ACmix": ({"in_planes": WIDTH, "out_planes": WIDTH}, {"kernel_att": 3, "head": 2, "stride": 2, "dilation": 2}),
    "EMA": ({"channels": WIDTH}, {"factor": 2}),
    "MSCANBlock": ({"dim": WIDTH}, {"mlp_ratio": 2.0, "drop": 0.5, "drop_path": 0.5}),
    "iRMB": ({"dim_in": WIDTH, "dim_out": WIDTH, "dim_head": 4, "window_size": 3}, {
        "norm_in": False, "has_skip": False, "exp_ratio": 2.0, "norm_layer": "ln_2d", "act_layer": "silu",
        "v_proj": (False, {"attn_s": False}), "dw_ks": 5, "stride": 2, "dilation": 2, "se_ratio": 0.25, "dim_head": 8, "window_size": 0,
        "attn_s": False, "qkv_bias": True, "attn_drop": 0.5, "drop": 0.5, "drop_path": 0.5, "v_group": True, "attn_pre": True,
    }),
    "SwinWindowAttention": ({"dim": WIDTH, "num_heads": 2, "window_size": 4}, {
        "window_size": 3, "num_heads": 4, "qkv_bias": False, "qk_scale": 2.0, "attn_drop": 0.5, "proj_drop": 0.5, "shift_size": 2,
    }),
    "SwinBlock": ({"dim": WIDTH, "num_heads": 2, "window_size": 4}, {
        "num_heads": 4, "window_size": 3, "shift_size": 2, "mlp_ratio": 2.0, "qkv_bias": False, "qk_scale": 2.0, "drop": 0.5,
        "attn_drop": 0.5, "drop_path": 0.5,
    }),
    "AxialAttention": ({"dim": WIDTH, "heads": 4}, {"heads": 2, "dim_heads": 3, "sum_axial_out": False}),
    "DATAttention": ({"dim": WIDTH, "n_heads": 4, "q_size": 9}, {
        "n_heads": 2, "n_groups": 2, "stride": 3, "ksize": 5, "offset_range_factor": -1.0, "q_size": 5, "use_pe": False, "dwc_pe": True,
        "log_cpb": True, "no_off": True, "fixed_pe": True, "attn_drop": 0.5, "proj_drop": 0.5, "n_head_channels": (4, {"n_heads": None}),
    }),
    "LKA": ({}, {"dim": (4, {}), "d_model": (4, {})}),
    "PConv": ({"dim": WIDTH}, {"n_div": 2}),
    "FasterNetBlock": ({"dim": WIDTH}, {
        "n_div": 2, "mlp_ratio": 1.0, "drop_path": 0.5, "layer_scale_init_value": 0.1, "act_layer": "ReLU",
    }),
    "VanillaBlock": ({"dim": WIDTH, "dim_out": WIDTH}, {"act_num": 1, "stride": 1, "act_learn": 0.5}),
    "RepVGGBlock": ({"in_channels": WIDTH, "out_channels": WIDTH}, {"stride": 2, "groups": 2}),
    "BottleRep": ({"in_channels": WIDTH, "out_channels": WIDTH}, {"basic_block": "ConvBNReLU"}),
    "YOLOv6RepBlock": ({"in_channels": WIDTH, "out_channels": WIDTH, "n": 4}, {
        "n": 2, "block": "BottleRep", "basic_block": ("ConvBNSiLU", {"block": "BottleRep"}),
    }),
}  # fmt: skip
# accepted because published calls pass them, with the values that mean the same; others are refused
ALIKE: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {
    "BiLevelRoutingAttention": {"auto_pad": ([True, False], [])},  # a map is always padded where it must be
    "nchwBRA": {"auto_pad": ([True, False], []), "attn_backend": (["torch"], ["cuda"])},
    "BottleneckTransformer": {"expansion": ([1], [2])},
    "BoT3": {"e2": ([1], [2])},
    "ACmix": {"kernel_conv": ([3], [5])},
    "EMA": {"c2": ([None, WIDTH], [4])},
    "AxialAttention": {"num_dimensions": ([2], [3]), "dim_index": ([1], [-1])},
    "DATAttention": {"kv_size": ([None, 9, 4, [9, 9]], [5])},
    "PConv": {"forward": (["split_cat", "slicing"], ["fast"])},
    "FasterNetBlock": {"norm_layer": (["BatchNorm2d"], ["LayerNorm"]), "pconv_fw_type": (["split_cat", "slicing"], ["fast"])},
    "RepVGGBlock": {"kernel_size": ([3], [5]), "padding": ([1], [0])},
}
CASES = [(name, option) for name, (_, options) in SWITCHES.items() for option in options]


def made(name: str, arguments: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return BLOCKS[name].cls(**arguments)


def trace(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """The parameters and buffers as they start, then output and input gradient of filled weights in training."""
    module = made(name, arguments)
    start = [value.clone() for value in module.state_dict().values()]
    torch.manual_seed(1)
    x = torch.randn(4, next(iter(arguments.values())), 9, 8, requires_grad=True)
    y = fill_(module).train()(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    return [*start, y.detach(), grad]


def alike(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(("name", "option"), CASES)
def test_option_changes_something(name, option):
    base, options = SWITCHES[name]
    value, beside = options[option] if isinstance(options[option], tuple) else (options[option], {})
    if name == "LKA":
        assert BLOCKS[name].cls(**{option: value}).conv1.in_channels == value
        return
    if option == "dimension":
        assert made(name, {**base, option: value}).g.weight.dim() == 2 + value
        return
    plain = trace(name, {**base, **beside})
    assert alike(plain, trace(name, {**base, **beside}))
    assert not alike(plain, trace(name, {**base, **beside, option: value}))


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, options in ALIKE.items() for option in options])
def test_option_that_published_calls_pass_is_checked(name, option):
    base = SWITCHES[name][0]
    same, refused = ALIKE[name][option]
    for value in same:
        assert alike(trace(name, base), trace(name, {**base, option: value}))
    for value in refused:
        with pytest.raises(ValueError, match=r".+"):
            made(name, {**base, option: value})


@pytest.mark.parametrize("name", SWITCHES)
def test_no_option_is_missing_here(name):
    base, options = SWITCHES[name]
    parameters = {p.name for p in inspect.signature(BLOCKS[name].cls).parameters.values() if p.kind is not p.VAR_KEYWORD}
    first = {"dim", "dim_in", "dim_out", "in_channels", "out_channels", "in_planes", "out_planes", "channels", "n_dims", "c1", "c2"}
    assert parameters - set(options) - set(ALIKE.get(name, {})) - (first & set(base)) == set()


@pytest.mark.parametrize("make", [
    lambda p: MSDA(12, 6, attn_drop=p), lambda p: MSDA(12, 6, proj_drop=p), lambda p: SwinWindowAttention(12, 3, attn_drop=p),
    lambda p: SwinWindowAttention(12, 2, shift_size=1, proj_drop=p), lambda p: CloAttention(12, 4, attn_drop=p),
    lambda p: CloAttention(12, 4, proj_drop=p), lambda p: FocalModulation(12, proj_drop=p), lambda p: ConvFFN(12, drop_out=p),
    lambda p: DATAttention(12, 3, q_size=4, attn_drop=p), lambda p: DATAttention(12, 3, q_size=4, proj_drop=p),
])  # fmt: skip
def test_dropout_keeps_the_mean_and_stops_after_training(make):
    module, plain = fill_(make(0.4)), fill_(make(0.0))
    x = torch.randn(1, 12, 4, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.eval()(x)
        assert torch.equal(module.eval()(x), expected)
        torch.manual_seed(0)
        draws = module.train()(x.expand(3000, -1, -1, -1))
    assert draws.std(0).max() > 0.05 * expected.abs().max()
    assert_close(draws.mean(0, keepdim=True), expected, 0.08)


def test_dropout_of_attention_in_an_inverted_residual_keeps_the_mean():
    """Before its batch norms."""
    module = fill_(iRMB(12, 12, dim_head=4, window_size=2, attn_drop=0.4)).train()
    x = torch.randn(1, 12, 4, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.manual_seed(0)
        draws = module._attend(x.expand(3000, -1, -1, -1), module.qk)
        expected = module.eval()._attend(x, module.qk)
    assert draws.std(0).max() > 0.05 * expected.abs().max()
    assert_close(draws.mean(0, keepdim=True), expected, 0.08)


def test_dropped_neighbours_weigh_nothing_and_the_others_more():
    """With all weights equal the sum over neighbours of ones is a count of kept ones over (1 - p) times their number."""
    at = Neighbourhood(3, 1)
    query, key, value = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 7, 6), torch.ones(1, 1, 7, 6)
    torch.manual_seed(0)
    counts = neighbourhood_attention(query, key, value, at, scale=1.0, dropout=0.25) * 9 * 0.75
    assert_close(counts, counts.round(), 1e-5)
    assert counts.unique().numel() > 1
    assert counts.max() <= 9.001


@pytest.mark.parametrize("block", [lambda p: SwinBlock(8, 2, 4, attn_drop=p), lambda p: DilateBlock(12, 6, attn_drop=p)])
def test_blocks_hand_the_dropout_on(block):
    assert block(0.3).attn.attn_drop == 0.3


# --- inverted residual: squeeze and excitation, dilation -------------------------------------------------------------------------------


def irmb_rule(module: iRMB, x: Tensor) -> Tensor:
    """Without attention: x + proj(v + SE(SiLU(BN(dilated depth-wise v)))), one offset of the kernel at a time."""
    y = gelu(point(module.v.conv, batch_normed(x, module.norm)))
    conv, norm, _ = module.conv_local
    kernel, apart, stride = conv.kernel_size[0], conv.dilation[0], conv.stride[0]
    height, width = (-(-n // stride) for n in y.shape[-2:])
    total = 0
    for dy in range(kernel):
        for dx in range(kernel):
            shifted = torch.zeros(*y.shape[:2], height, width, dtype=y.dtype)
            for r in range(height):
                for c in range(width):
                    row, column = r * stride + (dy - kernel // 2) * apart, c * stride + (dx - kernel // 2) * apart
                    if 0 <= row < y.shape[2] and 0 <= column < y.shape[3]:
                        shifted[..., r, c] = y[..., row, column]
            total = total + conv.weight[:, 0, dy, dx][:, None, None] * shifted
    local = batch_normed(total, norm)
    local = local / (1 + (-local).exp())
    if not isinstance(module.se, nn.Identity):
        inner = gelu(point(module.se.conv_reduce, local.flatten(2).sum(2, keepdim=True)[..., None] / (height * width)))
        local = local / (1 + (-point(module.se.conv_expand, inner)).exp())
    return x + point(module.proj.conv, y + local) if module.skip else point(module.proj.conv, local)


@pytest.mark.parametrize("options", [
    {}, {"dilation": 2}, {"dilation": 3, "dw_ks": 5}, {"se_ratio": 0.25}, {"se_ratio": 0.01}, {"dilation": 2, "stride": 2}, {"stride": 2},
    {"se_ratio": 0.5, "dilation": 2, "stride": 2, "dim_out": 5}, {"has_skip": False, "dilation": 2, "exp_ratio": 2.0},
])  # fmt: skip
def test_inverted_residual(options):
    module = iRMB(**{"dim_in": 4, "dim_out": 4, "attn_s": False, "act_layer": "gelu", **options})
    rule: Rule = irmb_rule
    check(module, rule, 2, 4, 5, 4)


def test_squeeze_and_excitation_has_the_published_keys():
    state = iRMB(8, 8, exp_ratio=2.0, se_ratio=0.25).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items() if key.startswith("se.")} == {
        "se.conv_reduce.weight": (4, 16, 1, 1), "se.conv_reduce.bias": (4,),
        "se.conv_expand.weight": (16, 4, 1, 1), "se.conv_expand.bias": (16,),
    }  # fmt: skip


# --- YOLOv6's blocks of plain convolutions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("basic", "act"), [("ConvBNReLU", lambda x: x.clamp(min=0)), ("ConvBNSiLU", lambda x: x / (1 + (-x).exp()))])
@pytest.mark.parametrize("widths", [(3, 3), (3, 5)])
def test_bottleneck_of_plain_convolutions(basic, act, widths):
    def rule(module: Any, x: Tensor) -> Tensor:
        y = x
        for layer in (module.conv1.block, module.conv2.block):
            y = act(batch_normed(spread(layer.conv, y), layer.bn))
        return y if widths[0] != widths[1] else y + module.alpha * x

    module = BLOCKS["BottleRep"].cls(*widths, basic_block=basic)
    check(module, rule, 2, widths[0], 4, 5)
    assert {key.rpartition(".")[0] for key in module.state_dict() if "." in key} == {
        f"conv{i}.block.{part}" for i in (1, 2) for part in ("conv", "bn")
    }


@pytest.mark.parametrize(("block", "basic", "count"), [("ConvBNSiLU", "RepVGGBlock", 4), ("BottleRep", "ConvBNSiLU", 2)])
def test_stack_of_plain_convolutions(block, basic, count):
    stack = BLOCKS["YOLOv6RepBlock"].cls(8, 8, 4, block, basic)
    assert 1 + len(stack.block) == count
    assert sum(isinstance(m, nn.SiLU) for m in stack.modules()) == 4
    assert stack(torch.zeros(1, 8, 5, 6)).shape == (1, 8, 5, 6)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("BottleRep", {"basic_block": "Conv"}, "known are .*'ConvBNSiLU'"), ("YOLOv6RepBlock", {"basic_block": "Conv"}, "known are block"),
    ("YOLOv6RepBlock", {"basic_block": "ConvBNSiLU"}, "is for block 'BottleRep', got block 'RepVGGBlock'"),
])  # fmt: skip
def test_other_blocks_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        BLOCKS[name].cls(8, 8, **options)


@pytest.mark.parametrize(("options", "message"), [
    ({"n_heads": 4, "n_head_channels": 3}, "4 heads of 3 channels should make 8"), ({"n_head_channels": 16}, "should make 8 channels"),
    ({"kv_size": 7, "q_size": 10}, r"kv_size 7 should be q_size 10 or its samples \[5, 5\] at stride 2"),
])  # fmt: skip
def test_deformable_attention_refuses_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        DATAttention(8, **options)


def test_routing_of_adaptive_windows_needs_a_number_of_keys():
    assert BLOCKS["BRA"].cls(8, 2, kv_per_win=-1)
    with pytest.raises(ValueError, match="kv_per_win -1 should be at least 1 with kv_downsample_mode 'ada_avgpool'"):
        BLOCKS["BRA"].cls(8, 2, kv_per_win=-1, kv_downsample_mode="ada_avgpool")
