"""What goes wrong with these modules elsewhere, one test a defect, and the constructors as people's files call them.

The contract covers most of it for every module; here each defect has a name, and a test that fails if it comes back.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model
from models.analysis.catalogue import same_width_names
from models.layers.attention.bilevel_routing import BiLevelRoutingAttention
from models.layers.attention.ops.identity import IdentityStart
from models.spec.registry import BLOCKS
from tests.contract.test_attention_contract import build, sample, step
from tests.golden import assert_close, fill_
from tests.tiny import tiny_cfg

# name: leading parameters with their defaults, as published (... for one without)
PUBLISHED: dict[str, dict[str, Any]] = {
    "NLBlockND": {"in_channels": ..., "inter_channels": None, "mode": "embedded", "dimension": 2, "bn_layer": True},
    "BoT3": {"c1": ..., "c2": ..., "n": 1, "e": 0.5, "e2": 1, "w": 20, "h": 20},
    "BottleneckTransformer": {"c1": ..., "c2": ..., "stride": 1, "heads": 4, "mhsa": True, "resolution": None, "expansion": 1},
    "BiLevelRoutingAttention": {"dim": ..., "num_heads": 8, "n_win": 7, "qk_dim": None},
    "FocalModulation": {"dim": ..., "focal_window": 3, "focal_level": 2},
    "CloAttention": {"dim": ..., "num_heads": 8},
    "AIFI": {"c1": ..., "cm": 2048, "num_heads": 8},
}
CALLS = [
    ("NLBlockND", (32,), {}), ("NLBlockND", (32, 16, "dot", 2, False), {}), ("NLBlockND", (32,), {"mode": "concatenate"}),
    ("BoT3", (32, 32, 1, 0.5, 1, 20, 20), {}), ("BoT3", (32, 32), {"n": 2, "e2": 1}),
    ("BottleneckTransformer", (32, 32), {}), ("BottleneckTransformer", (32, 32, 1, 4, True, (20, 20), 1), {}),
    ("BiLevelRoutingAttention", (32, 8, 7), {"qk_dim": None, "topk": 4, "side_dwconv": 3}),
    ("BiLevelRoutingAttention", (32,), {"num_heads": 4, "n_win": 8, "auto_pad": True}),
    ("FocalModulation", (32,), {"focal_window": 3, "focal_level": 2}), ("FocalModulation", (32, 9, 2, 2), {}),
    ("CloAttention", (32, 8, [4, 4], [5], 7), {}),
    ("CloAttention", (32,), {"num_heads": 4, "group_split": [2, 2], "kernel_sizes": [3], "window_size": 8, "attn_drop": 0.0}),
    ("AIFI", (32, 64, 8), {}),
]  # fmt: skip


def made(name: str, *args: Any, **options: Any) -> nn.Module:
    return fill_(BLOCKS[name].cls(*args, **options)).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_constructor_arguments_start_like_the_published_ones(name):
    parameters = list(inspect.signature(BLOCKS[name].cls).parameters.values())[: len(PUBLISHED[name])]
    assert {p.name: ... if p.default is p.empty else p.default for p in parameters} == PUBLISHED[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.parametrize(("name", "args", "options"), CALLS)
def test_constructors_accept_calls_found_in_published_configs(name, args, options):
    x = sample(9, 12)
    assert made(name, *args, **options)(x).shape == x.shape


@pytest.mark.parametrize(("row", "expected"), [
    (["AIFI", [1024, 8]], ("fc1.weight", (1024, 32))),
    (["AIFI", [32, 4]], ("fc1.weight", (32, 32))),  # a hidden width, though it equals the input's
    (["AIFI", [32]], ("fc1.weight", (2048, 32))),
    (["AIFI", []], ("fc1.weight", (2048, 32))),
    (["NLBlockND", []], ("g.weight", (16, 32))),
    (["FocalModulation", [32, {"focal_level": 3}]], ("f.weight", (2 * 32 + 4, 32))),
    (["EMA", [8]], ("conv1x1.weight", (4, 4))),
])  # fmt: skip
def test_rows_need_only_non_default_arguments(row, expected):
    key, shape = expected
    assert build_model(tiny_cfg(attention=row)).model[7].state_dict()[key].shape[:2] == shape


@pytest.mark.parametrize("name", same_width_names())
def test_identity_start_is_an_exact_no_op_for_every_module(name):
    x = sample(13, 20, batch=2)
    started = IdentityStart(build(name))
    assert torch.equal(started(x), x)
    started.train()
    y = started(x)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert started.gamma.grad is not None
    assert torch.isfinite(started.gamma.grad).all()


@pytest.mark.parametrize("name", same_width_names())
def test_output_does_not_depend_on_the_memory_layout(name):
    module, x = build(name), sample(13, 20, batch=2)
    with torch.no_grad():
        expected = module(x)
        views = {
            "channels last": x.to(memory_format=torch.channels_last),
            "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
            "a part": F.pad(x, (1, 2, 3, 4, 5, 6))[:, 5:-6, 3:-4, 1:-2],
        }
        for what, view in views.items():
            assert_close(module(view), expected, 1e-4, f"{name}, {what}")


@pytest.mark.parametrize("options", [{"n_win": 7}, {"n_win": 7, "auto_pad": True}, {"n_win": 8, "topk": 2}])
@pytest.mark.parametrize("name", ["BiLevelRoutingAttention", "nchwBRA"])
@pytest.mark.parametrize("size", [(20, 20), (3, 20), (20, 3), (1, 1)])
def test_bilevel_routing_accepts_sizes_not_divisible_by_its_windows(name, options, size):
    x = sample(*size)
    y = made(name, 32, 4, **options)(x)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", ["BiLevelRoutingAttention", "nchwBRA", "BiFormerBlock", "BiFormerBlockNCHW"])
def test_bilevel_routing_can_be_pickled_and_copied(name):
    module, x = build(name), sample(9, 12)
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)
        assert torch.equal(copy.deepcopy(module)(x), expected)


def test_routes_are_chosen_in_full_precision():
    """Scores that differ by less than bfloat16 can tell are still told apart under autocast."""
    module, seen = made("BiLevelRoutingAttention", 32, 4, n_win=2, topk=1), []
    assert isinstance(module, BiLevelRoutingAttention)
    x = sample(8, 8)
    real = torch.topk

    def spy(scores: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(scores.dtype)
        return real(scores, *args, **options)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(torch, "topk", spy)
        patch.setattr(Tensor, "topk", lambda self, *args, **options: spy(self, *args, **options))
        module(x)
    assert seen == [torch.float32]


@pytest.mark.parametrize("name", ["FocalModulation", "FocalModulationBlock"])
def test_focal_modulation_keeps_no_activation(name):
    module = build(name).train()
    step(module, sample(13, 20, batch=2))
    copied, file = copy.deepcopy(module), io.BytesIO()
    torch.save(module, file)
    parameters = sum(t.nbytes for t in module.state_dict().values())
    assert len(file.getvalue()) < parameters + 40_000
    assert not [v for m in copied.modules() for v in vars(m).values() if isinstance(v, Tensor)]


@pytest.mark.parametrize("window", [7, 8])
def test_clo_attention_accepts_sizes_not_divisible_by_its_window(window):
    x = sample(20, 20)
    assert made("CloAttention", 32, window_size=window)(x).shape == x.shape


def test_bot3_uses_its_position_encoding_and_every_layer():
    module = made("BoT3", 32, 32).train()
    module(sample(9, 12, batch=2)).square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    tables = [name for name in gradients if "rel_" in name]
    assert tables
    assert all(gradients[name] is not None and gradients[name].abs().sum() > 0 for name in tables)
    assert not [name for name, gradient in gradients.items() if gradient is None or "fc1" in name]


def test_position_tables_are_resized_not_cropped():
    """A map half as large uses the whole table: its last pixel lies at the table's end."""
    module = made("MHSA", 16, 8, 8, 4, True)
    small, large = (module._positions(torch.zeros(1, 16, n, n)) for n in (4, 8))
    assert_close(small[..., -1, -1], large[..., -1, -1], 1e-5)
    assert_close(small[..., 0, 0], large[..., 0, 0], 1e-5)


@pytest.mark.parametrize("name", ["MSDA", "DilateBlock", "S2Attention", "SimAM", "ACmix"])
def test_inputs_are_not_modified(name):
    x = sample(9, 12)
    kept = x.clone()
    build(name)(x)
    assert torch.equal(x, kept)


def test_s2_attention_shifts_every_pixel_by_one():
    """In-place shifts within overlapping memory smear the first pixel over the whole row."""
    from models.layers.attention.s2 import _shift

    x = torch.arange(4 * 3 * 5, dtype=torch.float32).reshape(1, 4, 3, 5)
    down, up, right, left = _shift(x, 2, 3).unbind(1)
    assert torch.equal(down[0], x[0, 0, [0, 0, 1]])
    assert torch.equal(up[0], x[0, 1, [1, 2, 2]])
    assert torch.equal(right[0], x[0, 2][:, [0, 0, 1, 2, 3]])
    assert torch.equal(left[0], x[0, 3][:, [1, 2, 3, 4, 4]])


@pytest.mark.parametrize("name", ["ACmix", "SOCA", "CrissCrossAttention", "DAttention"])
def test_half_precision_runs(name):
    x = sample(9, 12)
    y = copy.deepcopy(build(name)).half()(x.half())
    assert y.dtype == torch.float16
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("size", [(4, 9), (9, 4), (1, 7)])
def test_bam_accepts_rectangular_maps(size):
    assert build("BAM")(sample(*size)).shape[2:] == size


@pytest.mark.parametrize("channels", [2, 4, 6, 30])
def test_ema_accepts_fewer_channels_than_its_factor(channels):
    x = sample(9, 12, channels=channels)
    assert made("EMA", channels)(x).shape == x.shape


def test_simam_is_finite_for_a_single_pixel():
    x = sample(1, 1).requires_grad_()
    y = build("SimAM")(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
