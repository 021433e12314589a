"""Every building block gives the published outputs, gradients, parameter names and, where it can be folded, folded weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.layers.attention.yolov10 import Attention
from models.layers.flow import RealNVP
from models.layers.prototypes import FusedPrototypes, Prototypes
from models.model import fuse_layers
from models.spec.registry import BLOCKS
from tests.golden import Golden, all_names, assert_close, cases, cotangent, fill_, find

FOREIGN = {"CBAM", "ChannelAttention", "SpatialAttention"}  # attention has its own tests
RENAMED = {
    "ul_RepConv": "RepConvN",  # one name there, two different blocks here
    "v7_Conv_LeakyReLU": "Conv",  # a name of the vectors only
}
PARTS = {
    "ul_Attention": Attention,
    "ul_Proto": Prototypes,
    "ul_Proto26": FusedPrototypes,
    "ul_RealNVP": RealNVP,
}  # of registered blocks, not registered themselves
SAME_WIDTH = ("ul_PSA",)  # take the width once, the published class twice
OPTIONS: dict[str, dict[str, Any]] = {  # where sources disagree on a default
    "v5_Bottleneck": {"k": (1, 3)},
    "v5_BottleneckCSP": {"k": (1, 3)},
    "ul_SPPF": {"act": False},
    "v7_Conv_LeakyReLU": {"act": nn.LeakyReLU(0.1)},
}
WRONG_GRADIENTS = ("ul_AAttn__case1", "ul_ABlock__case1")  # stored gradients that are not the derivative of the stored output
CASES = [name for name in all_names("blocks") if name.split("_", 1)[1].split("__")[0] not in FOREIGN]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str, golden: Golden) -> nn.Module:
    short = name.split("__")[0]
    cls = PARTS.get(short) or BLOCKS[RENAMED.get(short, golden.meta["block"])].cls
    args = golden.meta["args"][1:] if short in SAME_WIDTH else golden.meta["args"]
    return cls(*args, **golden.meta["kwargs"], **OPTIONS.get(short, {})).eval()


def inputs_of(golden: Golden) -> Any:
    """The one input, or the list of inputs; ``input_i_j`` are the maps of a tuple."""
    keys = sorted(k for k in golden.arrays if k.startswith("input_"))
    grouped: dict[str, list[Tensor]] = {}
    for key in keys:
        grouped.setdefault(key.split("_")[1], []).append(golden.tensor(key))
    nested = [tuple(g) if f"input_{i}_0" in golden.arrays else g[0] for i, g in sorted(grouped.items())]
    return nested[0] if len(nested) == 1 and isinstance(nested[0], Tensor) else nested


def first_tensor(inputs: Any) -> Tensor:
    while not isinstance(inputs, Tensor):
        inputs = inputs[0]
    return inputs


@pytest.mark.parametrize("name", cases("blocks", CASES))
def test_block_agrees_with_the_published_one(name: str) -> None:
    golden = find("blocks", name)
    block = build(name, golden)
    if golden.meta["block"] != "DFL":  # its projection is fixed
        fill_(block)
    inputs = inputs_of(golden)
    first_tensor(inputs).requires_grad_(True)
    outputs = block(inputs)
    several = isinstance(outputs, tuple)
    outputs = list(outputs) if several else [outputs]
    for j, output in enumerate(outputs):
        assert_close(output, golden.tensor(f"output_{j}" if several else "output"), 1e-5, f"output {j}")
    sum((o * cotangent(j, tuple(o.shape))).sum() for j, o in enumerate(outputs)).backward()
    if name in WRONG_GRADIENTS:
        check_derivative(block, inputs)
    elif "grad_input_0" in golden.arrays:
        assert_close(first_tensor(inputs).grad, golden.tensor("grad_input_0"), 1e-4, "gradient of the input")
    if name not in WRONG_GRADIENTS:
        check_parameter_gradients(block, golden.meta.get("param_grad_norms") or {})
    if "fused_weight" in golden.arrays:
        check_folded_weights(block, golden)
        return
    assert [(k, list(v.shape)) for k, v in block.state_dict().items()] == [(k, s) for k, s in golden.meta["keys"]]
    if "output_fused" in golden.arrays:
        check_merged_branches(block, golden)


def check_derivative(block: nn.Module, x: Tensor) -> None:
    """The gradient of the input is the slope of the output by central differences, in float64."""
    block, x = copy.deepcopy(block).double(), x.detach().double().requires_grad_(True)
    weights = cotangent(0, tuple(block(x).shape)).double()
    (gradient,) = torch.autograd.grad((block(x) * weights).sum(), x)
    step = 1e-6 * torch.sign(cotangent(1, tuple(x.shape))).double()
    with torch.no_grad():
        slope = ((block(x + step) - block(x - step)) * weights).sum() / 2e-6
    assert_close((gradient * step).sum() / 1e-6, slope, 1e-5, "derivative")


def check_parameter_gradients(block: nn.Module, norms: dict[str, float | None]) -> None:
    grads = {k: None if p.grad is None else float(p.grad.norm()) for k, p in block.named_parameters()}
    assert set(norms) <= set(grads)
    assert {k for k, p in block.named_parameters() if p.requires_grad} <= set(norms)
    for key, norm in norms.items():
        assert (norm is None) == (grads[key] is None), key
        assert norm is None or grads[key] == pytest.approx(norm, rel=1e-3, abs=1e-4), key


def check_folded_weights(block: nn.Module, golden: Golden) -> None:
    fused = block.fused()
    assert [(k, list(v.shape)) for k, v in fused.state_dict().items()] == [(k, s) for k, s in golden.meta["keys"]]
    weight, bias = fused.state_dict().values()
    assert_close(weight, golden.tensor("fused_weight"), 1e-5, "folded weight")
    assert_close(bias, golden.tensor("fused_bias"), 1e-5, "folded bias")
    assert_close(fused(golden.tensor("input_0")), golden.tensor("output"), 1e-5, "folded output")


def check_merged_branches(block: nn.Module, golden: Golden) -> None:
    """A block of re-parameterised convolutions, alone or inside: the merged convolution, and the output after folding all."""
    fused = nn.Sequential(copy.deepcopy(block))
    fuse_layers(fused)
    assert_close(fused(golden.tensor("input_0")), golden.tensor("output_fused"), 1e-5, "folded output")
    merged = [m for m in fused.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (7, 7)]
    assert len(merged) == 1
    assert_close(merged[0].weight, golden.tensor("fused_conv_weight"), 1e-5, "merged weight")
    assert_close(merged[0].bias, golden.tensor("fused_conv_bias"), 1e-5, "merged bias")


def test_golden_cases_exist() -> None:
    assert len(CASES) >= 20
    assert all(np.isfinite(find("blocks", n).arrays["grad_input_0"]).all() for n in CASES[:5] if "grad_input_0" in find("blocks", n).arrays)
