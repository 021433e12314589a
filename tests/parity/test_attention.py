"""The published attention modules: outputs and input gradients against the golden vectors of reference/attention.

``ROLES`` says what each golden is: canonical goldens are required, information shows a variant that is not followed. Kept goldens run
everywhere; all of them where the reference folder lies beside the project.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.spec.registry import BLOCKS
from tests import golden as vectors
from tests.golden import all_names, assert_close, cotangent, fill_, find, input_array

# other names under which a golden's module must resolve
ALSO = {
    "FocalModulation": (),
    "FocalNetBlock": ("FocalModulationBlock",),
    "BiLevelRoutingAttention": ("BRA",),
    "nchwBRA": ("BiLevelRoutingAttention_nchw",),
    "BiFormerBlock": (),
    "BiFormerBlockNCHW": (),
    "CloAttention": ("EfficientAttention",),
    "CloConvFFN": ("ConvFFN",),
    "CloBlock": (),
    "NLBlockND": ("NonLocal",),
    "BoTMHSA": ("MHSA",),
    "BoT3": (),
    "BoTPaperAttention": (),
    "BoTPaperBlock": (),
    "FocalNetBackbone": (),
    "BiFormerBackbone": (),
    "CloFormerBackbone": (),
}
# arguments of a published constructor that say what a map says itself
DROPPED = {"FocalNetBlock": ("input_resolution",)}
# parameters that the published module owns and never uses: they have no place here
ABSENT: dict[str, tuple[str, ...]] = {"BoT3": ("fc1.",)}
# arguments that a golden was made with without saying so
IMPLIED: dict[str, dict[str, Any]] = {"BoT3": {"pos_emb": False}}
# goldens that show a defect which is not followed
DEFECTS = {"BoTMHSA__case2": "position tables of 14 x 14 are cut off to the first 64 rows for an 8 x 8 map; here they are resized"}
REQUIRED = tuple(ALSO)


def module_of(case: str) -> str:
    return case.split("__")[0]


def cases() -> list[str]:
    return [name for name in all_names("attention") if module_of(name) in REQUIRED and name not in DEFECTS]


def build(name: str, args: dict[str, Any]) -> nn.Module:
    dropped = DROPPED.get(name, ())
    given = {k: v for k, v in args.items() if k not in dropped}
    return fill_(BLOCKS[name].cls(**{**IMPLIED.get(name, {}), **given})).eval()


def grid(meta: dict[str, Any]) -> tuple[int, int]:
    """Height and width of a golden's tokens."""
    args = meta["args"]
    size = args.get("input_resolution") or args.get("window_size") or (meta["H"], meta["W"])
    return tuple(size)


def to_map(x: Tensor, meta: dict[str, Any]) -> Tensor:
    """A golden's input as (B, C, H, W), a leaf that takes a gradient."""
    if meta["layout"] == "BLC":
        x = x.reshape(x.shape[0], *grid(meta), -1)
    if meta["layout"] in ("BLC", "NHWC"):
        x = x.permute(0, 3, 1, 2)
    return x.contiguous().requires_grad_()


def from_map(x: Tensor, meta: dict[str, Any]) -> Tensor:
    """A map in the golden's layout."""
    if meta["layout"] in ("BLC", "NHWC"):
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1, 2) if meta["layout"] == "BLC" else x


@pytest.mark.parametrize("case", vectors.cases("attention", cases()))
def test_outputs_and_input_gradients_match_the_published_module(case):
    golden = find("attention", case)
    meta, name = golden.meta, module_of(case)
    module = build(name, meta["args"])
    inputs = [to_map(input_array(i, tuple(shape)), meta) for i, shape in enumerate(meta["input_shapes"])]
    result = module(*inputs) if len(inputs) == 1 else module(inputs)
    outputs = [from_map(y, meta) for y in (result if isinstance(result, (tuple, list)) else [result])]
    for i, output in enumerate(outputs):
        assert_close(output, golden.arrays[f"output{i}"], 1e-4, f"output {i}")
    loss = sum((outputs[i] * cotangent(i, tuple(outputs[i].shape))).sum() for i in meta["backward_outputs"])
    gradients = torch.autograd.grad(loss, inputs)
    for i, gradient in enumerate(gradients):
        assert_close(from_map(gradient, meta), golden.arrays[f"grad_input{i}"], 1e-4, f"gradient {i}")


@pytest.mark.parametrize("case", vectors.cases("attention", cases(), "names"))
def test_parameter_names_and_shapes_match_the_published_module(case):
    meta, name = find("attention", case).meta, module_of(case)
    absent = ABSENT.get(name, ())
    published = {key: tuple(shape) for key, shape in meta["keys"] if not any(part in key for part in absent)}
    assert {key: tuple(value.shape) for key, value in build(name, meta["args"]).state_dict().items()} == published


@pytest.mark.parametrize("name", REQUIRED)
def test_published_names_resolve(name):
    spec = BLOCKS[name]
    assert inspect.isclass(spec.cls)
    assert all(BLOCKS[other] is spec for other in ALSO.get(name, ()))
