"""What attention modules show of themselves agrees with what they do, for any size, and costs nothing elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.analysis.module_views import explainable_modules, module_views
from models.analysis.tracing import trace
from models.layers.attention.axial import AxialAttention
from models.layers.attention.bilevel_routing import BiLevelRoutingAttention
from models.layers.attention.bilevel_routing_nchw import BiLevelRoutingAttentionNCHW
from models.layers.attention.botnet import MHSA, BoTPaperAttention
from models.layers.attention.cbam import CBAM
from models.layers.attention.cloformer import CloAttention
from models.layers.attention.dat import DATAttention
from models.layers.attention.eca import ECA
from models.layers.attention.focalnet import FocalModulation
from models.layers.attention.nonlocal_block import NLBlockND
from models.layers.attention.se import SE
from models.layers.attention.swin import SwinWindowAttention
from models.layers.attention.yolov10 import Attention
from models.layers.attention.yolov12 import AreaAttention
from models.layers.explained import ChannelWeights, PlaneMap, Points, Query, Regions, split_heads
from tests.golden import assert_close, fill_, input_array
from tests.tiny import tiny_model

WIDTH = 16
MIDDLE = Query(0.55, 0.4)


def filled(module: nn.Module) -> nn.Module:
    return fill_(module, 1.0).eval()


def attended_at(module: nn.Module, x: Tensor, query: Query) -> Tensor:
    """Σ weight · value of one pixel, heads side by side: (C,)."""
    weights = module.weights_of(x, query)
    value = module.value(x) if isinstance(module, MHSA) else module._projected(x)[2]
    values = value[0] if value.dim() == 4 and value.shape[1] == module.heads else split_heads(value, module.heads)
    return (weights.unsqueeze(2) * values).sum(1).flatten()


@pytest.mark.parametrize("size", [(6, 7), (3, 4)])
@pytest.mark.parametrize(
    "module", [MHSA(WIDTH, 6, 7, 2, True), MHSA(WIDTH), BoTPaperAttention(WIDTH, (6, 7), 2)], ids=["places", "plain", "paper"]
)
def test_affinities_give_what_the_module_gives(module, size):
    x = input_array(1, (1, WIDTH, *size))
    module = filled(module)
    row, column = MIDDLE.cell(*size)
    with torch.no_grad():
        assert_close(attended_at(module, x, MIDDLE), module(x)[0, :, row, column])


@pytest.mark.parametrize("module", [Attention(WIDTH, 2), AreaAttention(WIDTH, 2, 4), AreaAttention(WIDTH, 2)], ids=["psa", "areas", "area"])
def test_affinities_give_what_goes_into_the_projection(module):
    x = input_array(2, (1, WIDTH, 6, 7))  # 42 pixels, which 4 areas do not divide
    module = filled(module)
    place = MIDDLE.cell_number(6, 7)
    seen = []
    module.proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        module(x)
        value = module._projected(x)[2]
        assert_close(attended_at(module, x, MIDDLE), (seen[0] - module.pe(value))[0].flatten(1)[:, place])


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("query", [MIDDLE, Query(0.99, 0.99), Query(0.0, 0.0)])
def test_window_weights_give_what_goes_into_the_projection(shift, query):
    x = input_array(3, (1, WIDTH, 9, 10))
    module = filled(SwinWindowAttention(WIDTH, 4, 2, shift_size=shift))
    seen = []
    module.proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        module(x)
        weights = module.weights_of(x, query)
        value = split_heads(module.qkv(x).chunk(3, 1)[2], 2)
        assert_close((weights.unsqueeze(2) * value).sum(1).flatten(), seen[0][0].flatten(1)[:, query.cell_number(9, 10)])
    assert_close(weights.sum(1), torch.ones(2))


@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("mode", ["gaussian", "embedded", "dot", "concatenate"])
def test_non_local_affinities_give_the_sum_before_the_last_layer(mode, sub_sample):
    x = 0.5 * input_array(4, (1, WIDTH, 6, 8))
    module = filled(NLBlockND(WIDTH, mode=mode, sub_sample=sub_sample))
    with torch.no_grad():
        value = module._summed(module.g(x).flatten(2).transpose(1, 2), x)[0]
        y = module.weights_of(x, MIDDLE) @ value
        row, column = MIDDLE.cell(6, 8)
        whole = (module(x) - x)[0, :, row, column]
        assert_close(module.W_z(y.view(1, -1, 1, 1))[0, :, 0, 0], whole)
    (view,) = module.explain(x, MIDDLE)
    assert view.values.shape == ((3, 4) if sub_sample else (6, 8))


@pytest.mark.parametrize("size", [(14, 14), (10, 9)])
@pytest.mark.parametrize("cls", [BiLevelRoutingAttention, BiLevelRoutingAttentionNCHW])
def test_routed_tokens_give_the_attention_of_one_pixel(cls, size):
    x = input_array(5, (1, WIDTH, *size))
    module = filled(cls(WIDTH, num_heads=1, n_win=3, topk=2, side_dwconv=0))
    last = module.wo if cls is BiLevelRoutingAttention else module.output_linear
    seen = []
    last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        module(x)
        regions, tokens, counts = module.explain(x, MIDDLE)
        value = module.qkv.qkv(x[0].permute(1, 2, 0))[..., -WIDTH:] if cls is BiLevelRoutingAttention else None
        value = module.qkv_linear(x)[0, -WIDTH:].permute(1, 2, 0) if value is None else value
        row, column = MIDDLE.cell(*size)
        got = (tokens.values.unsqueeze(2) * value).sum((0, 1))
    inside = float(tokens.values.sum())
    assert inside <= 1 + 1e-5
    if inside > 1 - 1e-5:  # no padding among the chosen pixels
        assert_close(got, seen[0][0, :, row, column])
    assert len(regions.boxes) == len(regions.weights) == 2
    x1, y1, x2, y2 = regions.own.tolist()
    assert x1 <= (column + 0.5) / size[1] <= x2
    assert y1 <= (row + 0.5) / size[0] <= y2
    assert counts.values.sum() == 2 * counts.values.numel()


def test_routed_tokens_without_padding_are_exact():
    x = input_array(5, (1, WIDTH, 12, 12))
    module = filled(BiLevelRoutingAttention(WIDTH, num_heads=1, n_win=3, topk=2, side_dwconv=0))
    seen = []
    module.wo.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        module(x)
        tokens = module.explain(x, MIDDLE)[1]
        value = module.qkv.qkv(x[0].permute(1, 2, 0))[..., -WIDTH:]
        row, column = MIDDLE.cell(12, 12)
        assert_close((tokens.values.unsqueeze(2) * value).sum((0, 1)), seen[0][0, :, row, column])
    assert int((tokens.values > 0).sum()) == 2 * 16


@pytest.mark.parametrize("mode", ["ada_avgpool", "maxpool"])
def test_downsampled_keys_share_their_weight_among_the_pixels_of_their_region(mode):
    x = input_array(5, (1, WIDTH, 12, 12))
    module = filled(
        BiLevelRoutingAttention(WIDTH, num_heads=2, n_win=3, topk=2, kv_per_win=2, kv_downsample_ratio=2, kv_downsample_mode=mode)
    )
    regions, tokens, _ = module.explain(x, MIDDLE)
    assert_close(tokens.values.sum(), torch.tensor(1.0))
    assert_close(regions.weights.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("module", [SE(WIDTH), ECA(WIDTH), *CBAM(WIDTH).children()], ids=["SE", "ECA", "channel", "spatial"])
def test_gate_is_what_multiplies_the_input(module):
    x = input_array(6, (1, WIDTH, 5, 6))
    module = filled(module)
    with torch.no_grad():
        assert_close(module(x), x * module.gate(x))
        (view,) = module.explain(x, MIDDLE)
    if isinstance(view, ChannelWeights):
        assert_close(view.values, module.gate(x)[0, :, 0, 0])
    else:
        assert_close(view.values, module.gate(x)[0, 0])


def test_focal_gates_and_modulator_are_those_of_the_forward_pass():
    x = input_array(7, (1, WIDTH, 6, 5))
    module = filled(FocalModulation(WIDTH, focal_level=3))
    with torch.no_grad():
        views = module.explain(x, MIDDLE)
        query, context, gates = module._project(x)
        assert_close(module(x), module.proj(query * module._modulator(context, gates)))
    assert [view.title.split(" (")[0] for view in views[:3]] == [f"gate of level {level}" for level in (1, 2, 3)]
    assert [view.title.split("(")[1] for view in views[:3]] == ["3×3 pixels)", "7×7 pixels)", "13×13 pixels)"]
    for level, view in enumerate(views[:4]):
        assert_close(view.values, gates[0, level])


def test_clo_attention_shows_local_weights_and_a_global_map_that_sums_to_one():
    x = input_array(8, (1, WIDTH, 10, 9))
    with torch.no_grad():
        local, signed, one, all_queries = filled(CloAttention(WIDTH, 4, window_size=4)).explain(x, MIDDLE)
    assert local.values.shape == signed.values.shape == (10, 9)
    assert float(signed.values.abs().max()) <= float(local.values.max()) <= 1
    assert one.values.shape == all_queries.values.shape == (3, 3)
    assert_close(one.values.sum(), torch.tensor(1.0))
    assert one.reach == (12 / 10, 12 / 9)


def test_sampling_points_are_those_that_the_module_samples():
    """A map of numbered rows and columns says at which of them: the middle of cell 0 is half a cell from the edge."""
    height, width = 8, 6
    x = input_array(9, (1, WIDTH, height, width))
    module = filled(DATAttention(WIDTH, 2, 1, stride=2, q_size=8))
    (view,) = module.explain(x, MIDDLE)
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    for points, shown in zip(module.sampling_points(module.proj_q(x)), (view.xy, view.origins_xy)):
        inside = (points.abs() <= 1).all(-1).flatten()
        assert inside.any()
        for axis, numbers, side in ((0, columns, width), (1, rows, height)):
            sampled = module._sample(numbers.expand(1, WIDTH, height, width), points)[0, 0].flatten()
            assert_close(((shown[:, axis] * side) - 0.5)[inside], sampled[inside], tol=1e-4)
    assert_close(view.weights.sum(), torch.tensor(1.0))


def test_axial_attention_shows_a_row_and_a_column():
    x = input_array(10, (1, WIDTH, 6, 7))
    for axis in filled(AxialAttention(WIDTH, 2)).axial_attentions:
        mean, *_ = axis.explain(x, MIDDLE)
        row, column = MIDDLE.cell(6, 7)
        line = mean.values[:, column] if axis.axis == 2 else mean.values[row]
        assert_close(line.sum(), torch.tensor(1.0))
        assert_close(mean.values.sum(), torch.tensor(1.0))


ATTENTIONS = ["BRA", "nchwBRA", "FocalModulation", "CloAttention", "NLBlockND", "MHSA", "CBAM", "SE", "ECA", "DAttention", "AxialAttention"]
ATTENTIONS += ["AreaAttention", "PSA", "SwinBlock", "CoordAtt", "ELA", "SimAM", "GC", "BAM", "CAA", "EffectiveSE", "GE", "NAM", "EMA"]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_kind_shows_something_in_a_network_and_keeps_nothing(name):
    model = tiny_model(attention=(name, []))
    modules = explainable_modules(model)
    assert [key for key in modules if key.startswith("model.7")]
    before = {key: set(vars(module)) for key, module in model.named_modules()}
    found = trace(model, input_array(1, (1, 3, 96, 160)).sigmoid(), [7], modules=modules)
    shown = [one for one in module_views(modules, found, MIDDLE) if one.row == 7]
    assert shown
    for one in shown:
        assert one.views, one
        assert not one.problem
        for view in one.views:
            tensor = {ChannelWeights: "values", PlaneMap: "values", Regions: "weights", Points: "xy"}[type(view)]
            assert torch.isfinite(getattr(view, tensor)).all()
            assert not getattr(view, tensor).requires_grad
    assert before == {key: set(vars(module)) for key, module in model.named_modules()}


def test_module_that_says_nothing_shows_its_energies():
    model = tiny_model(attention=("EMA", []))
    modules = {name: module for name, module in explainable_modules(model).items() if type(module).__name__ == "EMA"}
    found = trace(model, input_array(1, (1, 3, 64, 64)).sigmoid(), [7], modules=modules)
    (shown,) = module_views(modules, found, MIDDLE)
    assert [view.title for view in shown.views] == ["energy of the input", "energy of the output", "energy of what it changes"]


def test_module_whose_explain_fails_is_named_and_shows_its_energies(monkeypatch):
    def explain(self, x, query):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(FocalModulation, "explain", explain)
    model = tiny_model()
    modules = {name: module for name, module in explainable_modules(model).items() if isinstance(module, FocalModulation)}
    found = trace(model, input_array(1, (1, 3, 64, 64)).sigmoid(), [7], modules=modules)
    (shown,) = module_views(modules, found, MIDDLE)
    assert shown.problem == "FocalModulation.explain: RuntimeError: no such luck"
    assert shown.views
