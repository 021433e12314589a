"""Blocks of YOLOv10, YOLO11, YOLO12 and YOLO26 in rows of users' own files, with attention inside them, and on maps of any size."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.training.learning_rates import multipliers
from models import build_model
from models.edit.rows import edit
from models.layers.attention.yolov10 import PSABlock
from models.layers.attention.yolov12 import ABlock, AreaAttention
from models.layers.c3k import C3k
from models.layers.compact import CIB
from models.layers.conv import FusedConv
from models.layers.csp import Bottleneck
from models.spec.parser import load_spec
from tests.golden import assert_close, fill_
from utils.errors import UserError

WIDTH = 64
SCALES = {"n": [1.0, 1.0, 1024], "m": [1.0, 1.0, 1024], "l": [1.0, 1.0, 1024]}


def file_of(*rows: tuple, scale: str = "", head: str = "Detect", **keys) -> dict:
    """A file as ultralytics writes them, with these modules behind two convolutions."""
    scaled = {"scales": SCALES, "scale": scale} if scale else {}
    start = [[-1, 1, "Conv", [16, 3, 4]], [-1, 1, "Conv", [WIDTH, 3, 2]]]
    return {"nc": 2, **scaled, **keys, "backbone": [*start, *([-1, *row] for row in rows)], "head": [[[-1], 1, head, ["nc"]]]}


def built(*rows: tuple, scale: str = "") -> nn.Module:
    """The last layer before the head."""
    return build_model(file_of(*rows, scale=scale)).model[-2]


def test_c3k2_is_made_of_c3k_at_the_larger_scales():
    row = (2, "C3k2", [WIDTH, False, 0.25])
    assert isinstance(built(row, scale="n").m[0], Bottleneck)
    assert isinstance(built(row, scale="m").m[0], C3k)
    assert isinstance(built(row).m[0], Bottleneck), "a file without scales says what it wants"
    assert isinstance(built((2, "C3k2", [WIDTH, {"c3k": False}]), scale="m").m[0], Bottleneck), "an option given by name stands"
    with_attention = built((2, "C3k2", [WIDTH, True, 0.5, True]), scale="m").m[0]
    assert [type(layer) for layer in with_attention] == [Bottleneck, PSABlock]


def test_a2c2f_is_residual_at_the_largest_scales_unless_the_row_says_otherwise():
    row = (2, "A2C2f", [WIDTH, True, 4])
    assert built(row, scale="m").gamma is None
    large = built(row, scale="l")
    assert large.gamma.shape == (WIDTH,)
    assert large.m[0][0].mlp[0].conv.out_channels == int(1.2 * WIDTH // 2)
    assert [block.attn.area for block in large.m[0]] == [4, 4]
    assert built((2, "A2C2f", [WIDTH, True, 4, False, 2.0]), scale="l").gamma is None
    assert isinstance(built((2, "A2C2f", [WIDTH, False, -1]), scale="l").m[0], C3k)


@pytest.mark.parametrize(
    ("args", "activation", "added"),
    [
        ([WIDTH], nn.SiLU, False), ([WIDTH, 5], nn.SiLU, False), ([WIDTH, 5, {"act": False}], nn.Identity, False),
        ([WIDTH, 5, 3], nn.Identity, False), ([WIDTH, 5, 3, True], nn.Identity, True), ([WIDTH, 5, 3, True, {"act": True}], nn.SiLU, True),
    ],
)  # fmt: skip
def test_sppf_has_no_activation_in_rows_of_the_newer_form(args, activation, added):
    layer = built((1, "SPPF", args))
    assert type(layer.cv1.act) is activation
    assert layer.add is added


def test_the_number_of_a_row_is_that_of_the_blocks_inside():
    for name, args in (("C3k", []), ("C3k2", []), ("C2PSA", []), ("C2fPSA", []), ("C2fCIB", [True, True]), ("A2C2f", [])):
        assert len(built((3, name, [WIDTH, *args])).m) == 3


def test_psa_blocks_keep_their_width():
    with pytest.raises(UserError, match=r"row 2 \[C2PSA\].*C2PSA keeps its input's width: expected 64 channels out, got 32"):
        build_model(file_of((1, "C2PSA", [32])))
    with pytest.raises(UserError, match=r"row 2 \[PSABlock\].*5 heads should divide 64 channels"):
        build_model(file_of((1, "PSABlock", [{"num_heads": 5}])))


def test_a_file_with_yolov10s_head_is_one_of_ultralytics():
    assert load_spec(file_of((1, "SCDown", [WIDTH, 3, 2]), head="v10Detect")).dialect == "v8"


def test_blocks_of_area_attention_start_with_small_weights():
    for module in ABlock(128).modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            assert float(weight.abs().max()) <= 0.04
            assert float(weight.std()) == pytest.approx(0.0176, rel=0.05)  # 0.02, cut off at twice that


@torch.no_grad()
def test_large_kernels_fold_into_one_convolution():
    model = fill_(build_model(file_of((2, "C2fCIB", [WIDTH, True, True]))).eval())
    fused = model.fuse()
    x = torch.rand(1, 3, 72, 104)
    assert [type(block.cv1[2]) for block in fused.model[2].m] == [FusedConv, FusedConv]
    for got, want in zip(fused(x).main, model(x).main, strict=True):
        assert_close(got, want, 1e-5)


# rows of a block, the module inside, how many of it
EMBEDDED = [
    ("C3k2", [WIDTH, False], 2, Bottleneck), ("C3k2", [WIDTH, True], 4, Bottleneck), ("C3k2", [WIDTH, True, 0.5, True], 2, Bottleneck),
    ("C3k", [WIDTH], 2, Bottleneck), ("C2PSA", [WIDTH], 2, PSABlock), ("C2fPSA", [WIDTH], 2, PSABlock),
    ("A2C2f", [WIDTH, True, 4], 4, ABlock), ("A2C2f", [WIDTH, False], 4, Bottleneck), ("C2fCIB", [WIDTH, True], 2, CIB),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "count", "host"), EMBEDDED)
@torch.no_grad()
def test_attention_stands_inside_the_blocks_and_starts_as_a_no_op(name, args, count, host):
    plain = fill_(built((2, name, args))).eval()
    inside = fill_(built((2, f"{name}_EMA", [*args, {"factor": 4}]))).eval()
    started = built((2, f"{name}_CBAM", [*args, {"init": "identity"}])).eval()
    assert sum(isinstance(module, host) for module in plain.modules()) == count
    assert not any(isinstance(module, host) for module in inside.modules())
    assert len({key.split("attention.")[0] for key in inside.state_dict() if ".attention." in key}) == count
    for block in (inside, started):
        missing, unexpected = block.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected
        assert missing
        assert all(".attention." in key for key in missing)
    x = torch.randn(1, WIDTH, 7, 5)
    assert torch.equal(started(x), plain(x))
    assert not torch.allclose(inside(x), plain(x))


def test_attention_inside_larger_scales_follows_the_scale():
    assert isinstance(built((2, "C3k2_EMA", [WIDTH, False]), scale="m").m[0], C3k)
    assert built((2, "A2C2f_SimAM", [WIDTH, True, 4]), scale="l").gamma is not None


def test_learning_rates_count_attention_blocks_and_modules_inside_others():
    model = build_model(file_of((1, "A2C2f_EMA", [WIDTH]), (1, "C3k2_EMA", [WIDTH]), (1, "C2PSA", [WIDTH])))
    found = set(multipliers(model, "attention=2"))
    names = [name for name, _ in model.named_parameters()]
    assert found == {n for n in names if n.startswith(("model.2.", "model.4.")) or (n.startswith("model.3.") and ".attention." in n)}


def test_rows_of_the_new_blocks_are_edited_as_others():
    spec = load_spec(file_of((2, "C3k2", [WIDTH, False, 0.25]), (2, "C2PSA", [WIDTH])))
    edited = edit(spec, replace=["C3k2=C3k2_EMA", "C2PSA=C2PSA_CBAM"], insert="PSABlock@1", init="identity").spec
    assert [row.module for row in edited.rows[2:5]] == ["PSABlock", "C3k2_EMA", "C2PSA_CBAM"]
    assert build_model(edited.to_dict()).model[3].cv1.conv.out_channels == WIDTH // 2
    with pytest.raises(UserError, match=r"argument False is C3k2's c3k, and C2f takes shortcut there"):
        edit(spec, replace="C3k2=C2f")


# maps whose pixels 4 divides in whole rows, within rows, and not at all
SIZES = ((8, 6), (6, 6), (5, 7), (1, 2))


def in_areas() -> AreaAttention:
    return fill_(AreaAttention(64, 2, 4)).eval()


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_area_attention_traces_and_exports_for_other_sizes():
    onnxruntime = pytest.importorskip("onnxruntime")
    module, file, first = in_areas(), io.BytesIO(), torch.randn(1, 64, 8, 6)
    traced = torch.jit.trace(module, first, check_trace=False)
    axes = {"x": {0: "batch", 2: "height", 3: "width"}, "y": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(module, (first,), file, opset_version=17, input_names=["x"], output_names=["y"], dynamic_axes=axes, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for height, width in SIZES:
        x = torch.randn(2, 64, height, width)
        expected = module(x)
        assert_close(traced(x), expected, 1e-4, f"traced {height}x{width}")
        assert_close(np.asarray(session.run(None, {"x": x.numpy()})[0]), expected, 1e-4, f"exported {height}x{width}")


@pytest.mark.slow
@torch.no_grad()
def test_area_attention_compiles_without_graph_breaks():
    torch._dynamo.reset()
    module = in_areas()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    for height, width in SIZES[1:3]:
        x = torch.randn(1, 64, height, width)
        assert_close(compiled(x), module(x), 1e-4)


def test_area_attention_trains_where_areas_are_empty():
    """Three pixels in four areas, in half precision too: finite gradients for all."""
    module = in_areas().train()
    for height, width in ((1, 3), (3, 3)):
        x = torch.randn(2, 64, height, width, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(x).square().mean().backward()
        assert torch.isfinite(x.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())


class LargestTensor(TorchDispatchMode):
    """The number of values of the largest tensor that any operator gave."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.values = max(self.values, value.numel())
        return result


@pytest.mark.parametrize("size", [(48, 48), (45, 47)])
def test_area_attention_keeps_no_matrix_of_all_pairs(size):
    """Neither of the map's nor of an area's pixels, forward and backward; qkv is the largest map."""
    x = torch.randn(1, 64, *size, requires_grad=True)
    with LargestTensor() as seen:
        in_areas().train()(x).sum().backward()
    assert seen.values <= 3.1 * x.numel()
