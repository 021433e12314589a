"""Parts B and C of the attention catalogue, with necks and backbones: outputs and input gradients against the golden vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.spec.registry import BLOCKS
from tests import golden as vectors
from tests.golden import all_names, assert_close, cotangent, fill_, find, input_array
from tests.parity.test_attention import from_map, module_of, to_map

# canonical names, and the others under which each must resolve
SAME = (
    "ACmix", "AFPNBody3", "AFPNBody4", "ASFF2", "ASFF3", "ASFF4", "AxialAttention", "BiFPNLayer", "CBAM", "DeformableLKA",
    "DilateBlock", "ECA", "EMA", "FasterNetBlock", "GAM", "LKA", "LSKA", "LSKAAttention", "MSCA", "MSCANBlock", "MSCASpatialAttention",
    "MSDA", "NAM", "PConv", "ParNetAttention", "RepVGGBlock", "S2Attention", "SE", "SOCA", "ShuffleAttention", "ShuffleNetV2Unit",
    "SimAM", "SwinBlock", "SwinWindowAttention", "TripletAttention", "VanillaBlock", "YOLOv6RepBlock", "iRMB",
)  # fmt: skip
ALSO = dict.fromkeys(SAME, ()) | {
    "CoordAtt": ("CoordAttention", "CA"),
    "CrissCross": ("CrissCrossAttention",),
    "DATAttention": ("DAttention",),
    "DeformableLKAAttention": ("DLKA",),
    "LSK": ("LSKBlock",),
}
# arguments of a published constructor that say what a map says itself
DROPPED = {"SwinBlock": ("input_resolution",)}
# a canonical case's own class, where its arguments name a wrapper
WRAPPERS = {"LKA_Attention": "LKAAttention"}
CATALOGUE = (
    "BAM", "SK", "SGE", "A2Attention", "GC", "EffectiveSE", "GE", "ParallelPolarizedSelfAttention", "SequentialPolarizedSelfAttention",
    "CoTAttention", "MobileViTAttention", "MLCA", "ELA", "CAA", "CPCA", "DANet", "ExternalAttention", "PSA", "AIFI", "AreaAttention",
    "A2C2f", "C3TR", "C2f_iRMB", "AFPN", "BiFPN", "EfficientRep", "FasterNet", "VanillaNet", "ShuffleNetV2",
)  # fmt: skip


def cases() -> list[str]:
    return [name for name in all_names("attention") if module_of(name) in ALSO]


def build(case: str) -> tuple[nn.Module, dict]:
    name, meta = module_of(case), find("attention", case).meta
    args = {k: v for k, v in meta["args"].items() if k not in (*DROPPED.get(name, ()), "wrapper")}
    cls = BLOCKS[WRAPPERS.get(meta["args"].get("wrapper"), name)].cls
    return fill_(cls(**args)).eval(), meta


@pytest.mark.parametrize("case", vectors.cases("attention", cases()))
def test_outputs_and_input_gradients_match_the_published_module(case):
    golden = find("attention", case)
    module, meta = build(case)
    inputs = [to_map(input_array(i, tuple(shape)), meta) for i, shape in enumerate(meta["input_shapes"])]
    result = module(*inputs) if len(inputs) == 1 else module(inputs)
    outputs = [from_map(y, meta) for y in (result if isinstance(result, (tuple, list)) else [result])]
    for i, output in enumerate(outputs):
        assert_close(output, golden.arrays[f"output{i}"], 1e-4, f"output {i}")
    loss = sum((outputs[i] * cotangent(i, tuple(outputs[i].shape))).sum() for i in meta["backward_outputs"])
    for i, gradient in enumerate(torch.autograd.grad(loss, inputs)):
        assert_close(from_map(gradient, meta), golden.arrays[f"grad_input{i}"], 1e-4, f"gradient {i}")


@pytest.mark.parametrize("case", vectors.cases("attention", cases(), "names"))
def test_parameter_names_and_shapes_match_the_published_module(case):
    module, meta = build(case)
    published = {key: tuple(shape) for key, shape in meta["keys"]}
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == published


@pytest.mark.parametrize("case", vectors.cases("attention", [name for name in cases() if module_of(name) == "DATAttention"]))
def test_deformable_attention_samples_at_the_published_points(case):
    golden = find("attention", case)
    module, meta = build(case)
    points = module.sampling_points(module.proj_q(input_array(0, tuple(meta["input_shapes"][0]))))
    for i, got in enumerate(points, start=1):
        assert_close(got, golden.arrays[f"output{i}"], 1e-4, f"output {i}")


@pytest.mark.parametrize("case", vectors.cases("attention", [name for name in all_names("attention") if module_of(name) == "BAM"]))
def test_bam_has_the_published_branches_but_adds_them(case):
    """The source of these numbers multiplies the branches; they agree once that is done here, and differ as the module is."""
    golden = find("attention", case)
    module, _ = build(case)
    x = input_array(0, tuple(golden.meta["input_shapes"][0]))
    product = x * (1 + torch.sigmoid(module.channel_att(x) * module.spatial_att(x)))
    assert_close(product, golden.arrays["output0"], 1e-4, "the product")
    assert (module(x) - product).abs().max() > 1e-2
    assert_close(module(x), x * (1 + torch.sigmoid(module.channel_att(x) + module.spatial_att(x))), 1e-6, "the sum")


@pytest.mark.parametrize(("case", "args"), [("ul_ChannelAttention__case0", {"channels": 16}), ("ul_SpatialAttention__case0", {})])
def test_yolov8_gates_match_the_published_ones(case, args):
    if case not in all_names("blocks"):
        pytest.skip("the reference folder is not at hand")
    golden = find("blocks", case)
    module = fill_(BLOCKS[module_of(case).removeprefix("ul_")].cls(**args)).eval()
    x = golden.tensor("input_0").requires_grad_()
    y = module(x)
    assert_close(y, golden.arrays["output"], 1e-4, "output")
    (gradient,) = torch.autograd.grad((y * cotangent(0, tuple(y.shape))).sum(), x)
    assert_close(gradient, golden.arrays["grad_input_0"], 1e-4, "gradient")


@pytest.mark.parametrize("name", ALSO)
def test_published_names_resolve(name):
    assert all(BLOCKS[other] is BLOCKS[name] for other in ALSO[name])


@pytest.mark.parametrize("name", CATALOGUE)
def test_names_of_the_catalogue_resolve(name):
    assert name in BLOCKS
