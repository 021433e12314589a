"""Activations and their scope, folding of batch norms and branches, routing, and that every registered layer builds by its own rule."""

from __future__ import annotations

import copy
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.layers.conv import DFL, Conv, ConvTranspose, DWConv, activation_scope, fuse_conv_bn, make_activation, parse_activation
from models.layers.csp import RepNCSP
from models.layers.elan import RepNCSPELAN4
from models.layers.pooling import ADown
from models.layers.reparam import RepConv, RepConvN
from models.layers.routing import CBFuse, CBLinear, Concat, Contract, Expand, Focus, ReOrg, Shortcut, Silence
from models.spec.channel_rules import RuleContext, make_divisible
from models.spec.registry import BLOCKS
from tests.tiny import tiny_cfg
from utils.errors import UserError


def unsettle(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and batch statistics, so that nothing is folded that happens to be zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.3 * noise.abs() if key.endswith("running_var") else 0.3 * noise)
    return module.eval()


def fold_children(module: nn.Module) -> nn.Module:
    """What Model.fuse() does: inmost first."""
    for name, child in list(module.named_children()):
        setattr(module, name, fold_children(child))
    return module.fused() if hasattr(module, "fused") else module


# --- activations


def test_default_activation_holds_within_its_scope() -> None:
    assert isinstance(Conv(4, 4).act, nn.SiLU)
    with activation_scope(nn.ReLU):
        outer = Conv(4, 4)
        with activation_scope(lambda: nn.LeakyReLU(0.1)):
            inner = Conv(4, 4)
        again = Conv(4, 4)
    assert isinstance(outer.act, nn.ReLU)
    assert isinstance(inner.act, nn.LeakyReLU)
    assert inner.act.negative_slope == 0.1
    assert isinstance(again.act, nn.ReLU)
    assert isinstance(Conv(4, 4).act, nn.SiLU)


def test_activation_scope_ends_on_an_exception() -> None:
    with pytest.raises(RuntimeError, match="boom"), activation_scope(nn.ReLU):
        raise RuntimeError("boom")
    assert isinstance(Conv(4, 4).act, nn.SiLU)


def test_activation_scopes_are_per_thread() -> None:
    def build(cls: type[nn.Module]) -> list[type[nn.Module]]:
        with activation_scope(cls):
            return [type(m.act) for m in (Conv(2, 2) for _ in range(50))]

    kinds = (nn.ReLU, nn.Mish, nn.GELU, nn.Hardswish)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(build, kinds)) == [[k] * 50 for k in kinds]


def test_activation_arguments() -> None:
    prelu = nn.PReLU()
    a, b = Conv(2, 2, act=prelu), Conv(2, 2, act=prelu)
    assert isinstance(a.act, nn.PReLU)
    assert a.act is not prelu
    assert a.act is not b.act
    for nothing in (False, None):
        assert isinstance(make_activation(nothing), nn.Identity)


def test_conv_takes_an_activation_where_yolov7_has_no_dilation() -> None:
    conv = Conv(3, 8, 3, 2, None, 1, nn.LeakyReLU(0.1))
    assert isinstance(conv.act, nn.LeakyReLU)
    assert conv.conv.dilation == (1, 1)


@pytest.mark.parametrize(
    ("text", "kind", "attributes"),
    [
        ("nn.SiLU()", nn.SiLU, {}),
        ("nn.ReLU", nn.ReLU, {}),
        (" torch.nn.Mish() ", nn.Mish, {}),
        ("LeakyReLU(0.1)", nn.LeakyReLU, {"negative_slope": 0.1}),
        ("nn.LeakyReLU(negative_slope=0.2, inplace=True)", nn.LeakyReLU, {"negative_slope": 0.2, "inplace": True}),
    ],
)
def test_parse_activation(text: str, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
    factory = parse_activation(text)
    assert isinstance(factory(), kind)
    assert factory() is not factory()
    assert all(getattr(factory(), k) == v for k, v in attributes.items())


@pytest.mark.parametrize(
    "text",
    [
        "nn.SLU()", "nn.Linear(2, 2)", "nn.SiLU(", "", "__import__('os').system('true')", "nn.LeakyReLU(open('x'))",
        "nn.ReLU().__class__()", "nn.LeakyReLU(1, 2, 3, 4)", "nn.SiLU(**{})", "nn.SiLU(*[True])", "lambda: 0", "3",
    ],
)  # fmt: skip
def test_parse_activation_refuses(text: str) -> None:
    with pytest.raises(UserError):
        parse_activation(text)


def test_unknown_activation_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="SiLU"):
        parse_activation("nn.SLU()")


# --- folding


@pytest.mark.parametrize(
    ("channels", "block"),
    [
        (6, Conv(6, 8, 3, 2)),
        (8, Conv(8, 8, (3, 5), g=4, d=2, act=False)),
        (8, DWConv(8, 16, 3)),
        (6, ConvTranspose(6, 4)),
        (6, RepConvN(6, 8)),
        (8, RepConvN(8, 8, s=2, g=4)),
        (6, RepConv(6, 8)),
        (8, RepConv(8, 8)),
        (8, RepConv(8, 8, g=4)),
        (8, RepNCSP(8, 8, 2)),
        (8, RepNCSPELAN4(8, 12, 8, 4, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
@torch.no_grad()
def test_folded_layer_equals_the_original_without_batch_norms(channels: int, block: nn.Module) -> None:
    block = unsettle(copy.deepcopy(block)).double()
    before = copy.deepcopy(block.state_dict())
    x = torch.randn(2, channels, 9, 7).double()
    expected = block(x)
    folded = fold_children(copy.deepcopy(block))
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not folded.training
    torch.testing.assert_close(folded(x), expected, rtol=1e-9, atol=1e-9)
    if hasattr(block, "fused"):  # also without its children folded first, and without touching it
        torch.testing.assert_close(block.fused()(x), expected, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(before[k], v) for k, v in block.state_dict().items())


@torch.no_grad()
def test_fuse_conv_bn_keeps_a_convolution_bias() -> None:
    pair = unsettle(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(5)))
    x = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(fuse_conv_bn(*pair)(x), pair(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_folding_half_precision_stays_half() -> None:
    block = unsettle(Conv(4, 4, 3)).half()
    assert {p.dtype for p in block.fused().parameters()} == {torch.float16}


def test_folded_transposed_convolution_folds_once() -> None:
    once = unsettle(ConvTranspose(4, 4)).fused()
    assert once.fused() is once
    assert list(once.state_dict()) == ["conv_transpose.weight", "conv_transpose.bias"]


@pytest.mark.parametrize("options", [{"k": 5}, {"p": 0}])
@pytest.mark.parametrize("cls", [RepConv, RepConvN])
def test_reparameterised_convolutions_are_3x3(cls: type[nn.Module], options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="3x3"):
        cls(4, 4, **options)


# --- routing


def test_reorg_and_contract_move_space_into_channels() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    slices = [x[..., dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]  # column offset major
    assert torch.equal(ReOrg()(x), torch.cat(slices, 1))
    rows = [x[..., dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)]
    assert torch.equal(Contract()(x), torch.cat(rows, 1))
    assert torch.equal(Expand()(Contract()(x)), x)
    assert Focus(3, 5)(x).shape == (2, 5, 2, 3)


def test_cblinear_and_cbfuse() -> None:
    split = CBLinear(8, [4, 6])
    maps = split(torch.randn(2, 8, 4, 5))
    assert isinstance(maps, tuple)
    assert [m.shape[1] for m in maps] == [4, 6]
    last = torch.randn(2, 6, 8, 10)
    expected = last + maps[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(CBFuse([1])([maps, last]), expected)


def test_inputs_are_not_modified() -> None:
    a, b = torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
    assert torch.equal(Shortcut()([a, b, a]), torch.full_like(a, 3))
    assert torch.equal(Concat()([a, b]), torch.ones(1, 4, 3, 3))
    assert torch.equal(a, b)
    assert Silence()(a) is a
    assert Silence.is_identity


@pytest.mark.parametrize("name", ["Concat", "Foldcut", "Chuncat"])
def test_concat_refuses_other_dimensions(name: str) -> None:
    with pytest.raises(ValueError, match="dimension 1"):
        BLOCKS[name].cls(2)


def test_dfl_is_an_expectation_and_never_trained() -> None:
    dfl = DFL(16)
    assert not any(p.requires_grad for p in dfl.parameters())
    logits = torch.full((1, 4, 16, 3), -1e4)
    for side in range(4):
        logits[:, side, 3 * side] = 1e4
    assert torch.equal(dfl(logits.view(1, 64, 3))[0, :, 0], torch.tensor([0.0, 3.0, 6.0, 9.0]))
    assert dfl(torch.zeros(0, 64, 0)).shape == (0, 4, 0)
    assert torch.equal(dfl.half().conv.weight.float().flatten(), torch.arange(16.0))


@pytest.mark.parametrize("size", [(9, 7), (8, 8), (2, 5)])
def test_adown_halves_and_rounds_down(size: tuple[int, int]) -> None:
    assert ADown(8, 6)(torch.randn(1, 8, *size)).shape[2:] == (size[0] // 2, size[1] // 2)


# --- every registered layer


def is_own(module: str) -> bool:
    return module.startswith(("models.layers.", "torch.nn")) and ".attention" not in module


OWN = sorted(name for name in BLOCKS if is_own(BLOCKS[name].cls.__module__))
ROWS: dict[str, list[Any]] = {
    "ELAN1": [32, 32, 16], "RepNCSPELAN4": [32, 32, 16, 1], "SPPELAN": [32, 16], "CBLinear": [[8, 12]], "CBFuse": [[1]],
    "nn.Upsample": [None, 2, "nearest"], "nn.MaxPool2d": [2], "nn.AvgPool2d": [2], "nn.ZeroPad2d": [[0, 1, 0, 1]],
    "nn.ReflectionPad2d": [1], "nn.Conv2d": [32, 3], "nn.ConvTranspose2d": [32, 2, 2],
    "nn.PixelShuffle": [2], "nn.PixelUnshuffle": [2], "GhostBottleneck": [32, 3, 2],
    "HGStem": [16, 32], "HGBlock": [16, 32],
    "ResX": [64], "ResXCSPA": [64], "ResXCSPC": [64],  # 32 groups
}  # fmt: skip
BARE = {"out_width": [32], "out_width_repeated": [32]}
SEVERAL = {"concat", "add"}


def inputs_for(name: str) -> tuple[Any, tuple[Any, ...]]:
    """An input and its width as the parser would say it."""
    x = torch.randn(2, 16, 8, 12)
    if name == "CBFuse":
        return [(torch.randn(2, 8, 4, 6), torch.randn(2, 16, 4, 6)), x], ((8, 16), 16)
    if name == "DFL":
        return torch.randn(2, 64, 21), (64,)
    if BLOCKS[name].channels.__name__ in SEVERAL:
        return [x, torch.randn_like(x)], (16, 16)
    return x, (16,)


@pytest.mark.parametrize("name", OWN)
def test_registered_layer_has_the_width_of_its_rule(name: str) -> None:
    spec = BLOCKS[name]
    x, in_channels = inputs_for(name)
    context = RuleContext(
        in_channels=in_channels, repeats=1, width=lambda c: make_divisible(c), nc=3, anchors=None, dialect="v5", cls=spec.cls
    )
    plan = spec.channels(ROWS.get(name, BARE.get(spec.channels.__name__, [])), context)
    layer = spec.cls(*plan.args, **plan.kwargs)
    out = layer(x)
    widths = tuple(o.shape[1] for o in out) if isinstance(out, tuple) else out.shape[1]
    assert widths == plan.out_channels
    trained = {k for k, p in layer.named_parameters() if p.requires_grad}
    if trained:
        total = sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,)))
        assert isinstance(total, Tensor)
        total.backward()
        assert {k for k, p in layer.named_parameters() if p.grad is not None} == trained
    assert spec.cls.__doc__


def test_zeros_before_a_max_pool_are_zeros_in_onnx_too() -> None:
    """onnxruntime folds a padding operator into the pooling, whose own padding never wins; yolov3-tiny has this pair."""
    onnxruntime = pytest.importorskip("onnxruntime")
    network = nn.Sequential(BLOCKS["nn.ZeroPad2d"].cls([0, 1, 2, 0]), nn.MaxPool2d(2, 1)).eval()
    x, file = -1 - torch.rand(1, 3, 4, 5), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (x,), file, opset_version=17, dynamo=False, input_names=["x"])
    (got,) = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    assert (network(x) == 0).any()
    assert np.allclose(got, network(x))


def test_image_sides_are_multiples_of_the_largest_stride() -> None:
    """A head of P3 and P4 over a network that goes down to P5 and up again: a side of 48 px would not come back together."""
    model = build_model("yolov5-p34.yaml")
    assert max(model.strides) == 16
    assert model.stride == model.deploy().stride == 32
    assert build_model(tiny_cfg()).stride == 32
