"""Options of attention that no row has by default, exported with a free height and width: the file agrees with torch at any size."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.layers.attention.ops.shared import window_maxima, window_means
from models.spec.registry import BLOCKS
from tests.golden import assert_close, fill_

TRACED = (12, 16)
SIZES = ((13, 20), (7, 9), (20, 20), (3, 5), (1, 2))  # not multiples of a window, below one, one pixel
ROUTED = {"dim": 8, "num_heads": 2, "n_win": 3, "topk": 2, "kv_downsample_ratio": 2}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("BottleneckTransformer", {"c1": 8, "c2": 8, "stride": 2}),
    ("BoTPaperBlock", {"dim": 8, "dim_out": 16, "downsample": True, "dim_head": 4}),
    ("BoTPaperBlock", {"dim": 8, "downsample": True, "dim_head": 4, "rel_pos_emb": False}),
    ("VanillaBlock", {"dim": 8, "dim_out": 8}),
    ("VanillaBlock", {"dim": 8, "dim_out": 8, "stride": 3, "act_learn": 0.5}),
    *(("BRA", {**ROUTED, "kv_downsample_mode": mode, "kv_per_win": 2}) for mode in ("ada_avgpool", "ada_maxpool", "avgpool", "maxpool")),
    ("BRA", {**ROUTED, "kv_downsample_mode": "avgpool", "kv_downsample_kernel": 3}),
    ("BRA", {**ROUTED, "kv_downsample_mode": "maxpool", "kv_downsample_kernel": 5}),
    ("BRA", {**ROUTED, "soft_routing": True, "param_routing": True}),
    ("nchwBRA", {"dim": 8, "num_heads": 2, "n_win": 3, "topk": 2}),
    *(("NLBlockND", {"in_channels": 8, "sub_sample": True, "mode": mode}) for mode in ("gaussian", "embedded", "dot", "concatenate")),
    *(("NLBlockND", {"in_channels": 8, "mode": mode}) for mode in ("gaussian", "dot", "concatenate")),
    ("iRMB", {"dim_in": 8, "dim_out": 8, "dim_head": 4, "dilation": 2, "se_ratio": 0.25}),
    ("iRMB", {"dim_in": 8, "dim_out": 8, "dim_head": 4, "window_size": 0}),
    ("ACmix", {"in_planes": 8, "out_planes": 8, "stride": 2, "dilation": 2}),
    ("CloBlock", {"dim": 8, "stride": 2}),
    ("CloAttention", {"dim": 8, "window_size": 9}),
    ("DATAttention", {"dim": 8, "n_heads": 2, "no_off": True}),
    ("DATAttention", {"dim": 8, "n_heads": 2, "fixed_pe": True, "q_size": 8}),
    ("DATAttention", {"dim": 8, "n_heads": 2, "log_cpb": True}),
]


class ReadsSize(nn.Module):
    """The module where it stands in a network: what follows reads its output's height and width."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        return y + torch.arange(y.shape[2])[:, None] + torch.arange(y.shape[3])


def exported(module: nn.Module) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    file, axes = io.BytesIO(), {name: {0: f"{name}0", 2: f"{name}2", 3: f"{name}3"} for name in ("x", "y")}
    with torch.no_grad():
        torch.onnx.export(
            module, (torch.randn(1, 8, *TRACED),), file, opset_version=17, input_names=["x"], output_names=["y"], dynamic_axes=axes,
            dynamo=False,
        )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("name", "arguments"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_onnx_agrees_at_other_sizes(name, arguments):
    module = ReadsSize(fill_(BLOCKS[name].cls(**arguments))).eval()
    session = exported(module)
    for height, width in (TRACED, *SIZES):
        x = torch.randn(2, 8, height, width, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert_close(np.asarray(session.run(None, {"x": x.numpy()})[0]), module(x), 1e-4, f"{name} {height}x{width}")


@pytest.mark.parametrize("pool", [window_means, window_maxima])
@pytest.mark.filterwarnings("ignore")
def test_pooling_windows_are_never_above_the_map_in_a_graph(pool):
    """OpenVINO gives other shapes for a pooling that rounds up on a map below its window; a traced graph pads and rounds down."""
    traced = torch.jit.trace(lambda x: pool(x, 3), torch.randn(1, 2, 6, 6))
    pools = [node for node in traced.inlined_graph.nodes() if "pool2d" in node.kind()]
    assert pools
    ceil_mode = {"aten::avg_pool2d": 4, "aten::max_pool2d": 5}
    assert not any(list(node.inputs())[ceil_mode[node.kind()]].toIValue() for node in pools)
    for size in ((1, 2), (5, 7), (6, 6)):
        x = torch.randn(2, 2, *size)
        assert_close(traced(x), pool(x, 3), 1e-6)


def test_fused_pooling_block_gives_the_same_map():
    block = fill_(BLOCKS["VanillaBlock"].cls(8, 8, stride=2)).eval()
    x = torch.randn(1, 8, 5, 7)
    assert_close(block.fused()(x), block(x), 1e-5)


@pytest.mark.parametrize("mode", ["avgpool", "maxpool"])
def test_windows_below_the_kernel_have_one_key(mode):
    """1 x 2 pixels a window, kernel 3: the key is the mean or the maximum of both."""
    module = fill_(BLOCKS["BRA"].cls(**{**ROUTED, "kv_downsample_mode": mode, "kv_downsample_kernel": 3}))
    windows = torch.randn(2, 9, 2, 8)
    expected = windows.mean(2, keepdim=True) if mode == "avgpool" else windows.amax(2, keepdim=True)
    assert_close(module._downsample(windows, 1, 2), expected, 1e-6)
    assert module(torch.randn(1, 8, 3, 5)).shape == (1, 8, 3, 5)
