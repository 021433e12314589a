"""The shelf's modules without published vectors against plain formulas, one pixel or one neighbour at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.attention.ops import shared
from models.spec.registry import BLOCKS
from tests.golden import assert_close, fill_

CHANNELS, HEIGHT, WIDTH = 16, 5, 7


def built(name: str, *args, channels: int = CHANNELS, **options):
    return fill_(BLOCKS[name].cls(channels, *args, **options)).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))


def linear(layer, v: Tensor) -> Tensor:
    """A pointwise layer as a matrix on (B, C, N)."""
    out = layer.weight.flatten(1) @ v
    return out if layer.bias is None else out + layer.bias[:, None]


def norm(v: Tensor, dim: int, eps: float) -> Tensor:
    return (v - v.mean(dim, keepdim=True)) / (v.var(dim, unbiased=False, keepdim=True) + eps).sqrt()


def by_steps(module, name: str, x: Tensor) -> Tensor:
    return FORMULAS[name](module, x.flatten(2)).reshape(x.shape)


def effective_se(m, v):
    return v * (linear(m.fc, v.mean(2, keepdim=True)) + 3).clamp(0, 6) / 6


def sge(m, v):
    out = []
    for g, group in enumerate(v.chunk(m.groups, 1)):
        similarity = (group * group.mean(2, keepdim=True)).sum(1, keepdim=True)
        gate = torch.sigmoid(m.weight[0, g, 0, 0] * norm(similarity, 2, 1e-5) + m.bias[0, g, 0, 0])
        out.append(group * gate)
    return torch.cat(out, 1)


def a2(m, v):
    features, gather, spread = linear(m.convA, v), F.softmax(linear(m.convB, v), 2), F.softmax(linear(m.convV, v), 1)
    descriptors = torch.einsum("bmn,bkn->bmk", features, gather)
    return v + linear(m.conv_reconstruct, torch.einsum("bmk,bkn->bmn", descriptors, spread))


def gc(m, v):
    context = (F.softmax(linear(m.conv_mask, v), 2) * v).sum(2, keepdim=True)
    first, layer_norm, _, last = m.channel_add_conv
    hidden = norm(linear(first, context), 1, 1e-5) * layer_norm.weight[:, None] + layer_norm.bias[:, None]
    return v + linear(last, hidden.clamp(min=0))


def polarized_gates(m, v):
    query = F.softmax(linear(m.ch_wq, v), 2)
    hidden = linear(m.ch_wz, (linear(m.ch_wv, v) * query).sum(2, keepdim=True))
    channel = torch.sigmoid(norm(hidden, 1, 1e-5) * m.ln.weight[:, None] + m.ln.bias[:, None])

    def spatial(u):
        weights = F.softmax(linear(m.sp_wq, u).mean(2, keepdim=True), 1)
        return torch.sigmoid((weights * linear(m.sp_wv, u)).sum(1, keepdim=True))

    return channel, spatial


def parallel(m, v):
    channel, spatial = polarized_gates(m, v)
    return v * channel + v * spatial(v)


def sequential(m, v):
    channel, spatial = polarized_gates(m, v)
    return (v * channel) * spatial(v * channel)


def external(m, v):
    weights = F.softmax(linear(m.mk, v), 2)
    return linear(m.mv, weights / weights.sum(1, keepdim=True))


def aifi(m, v):
    quarter = CHANNELS // 4
    frequency = [10000 ** (-i / quarter) for i in range(quarter)]
    position = torch.empty(CHANNELS, HEIGHT * WIDTH)
    for place in range(HEIGHT * WIDTH):
        row, column = divmod(place, WIDTH)
        parts = [f(c * w) for c, f in ((row, math.sin), (row, math.cos), (column, math.sin), (column, math.cos)) for w in frequency]
        position[:, place] = torch.tensor(parts)
    weights, biases = m.ma.in_proj_weight.chunk(3), m.ma.in_proj_bias.chunk(3)
    query, key, value = (w @ u + b[:, None] for w, b, u in zip(weights, biases, (v + position, v + position, v)))
    out = []
    for q, k, u in zip(*(part.chunk(m.ma.heads, 1) for part in (query, key, value))):
        out.append(u @ F.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), 2).transpose(1, 2))
    v = norm(v + linear(m.ma.out_proj, torch.cat(out, 1)), 1, 1e-5) * m.norm1.weight[:, None] + m.norm1.bias[:, None]
    v = v + linear(m.fc2, F.gelu(linear(m.fc1, v)))
    return norm(v, 1, 1e-5) * m.norm2.weight[:, None] + m.norm2.bias[:, None]


FORMULAS = {
    "EffectiveSE": effective_se, "SGE": sge, "A2Attention": a2, "GC": gc, "ParallelPolarizedSelfAttention": parallel,
    "SequentialPolarizedSelfAttention": sequential, "ExternalAttention": external, "AIFI": aifi,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_module_equals_its_formula(name, x):
    module = built(name)
    assert_close(module(x), by_steps(module, name, x), 1e-5, name)


@pytest.mark.parametrize("extent", [0, 2, 8])
def test_gather_excite_equals_its_formula(extent, x):
    module = built("GE", extent)
    gathered = x.mean((2, 3), keepdim=True) if extent == 0 else module.gather(x)
    rows, columns = ([i * n // size for i in range(size)] for n, size in zip(gathered.shape[2:], (HEIGHT, WIDTH)))
    assert_close(module(x), x * torch.sigmoid(gathered[:, :, rows][:, :, :, columns]), 1e-6)
    assert len(list(module.parameters())) == 3 * (extent.bit_length() - 1 if extent else 0)


def test_ela_gate_is_the_product_of_row_and_column_gates(x):
    module = built("ELA")
    rows, columns = (torch.sigmoid(module.gn(module.conv(x.mean(dim)))) for dim in (3, 2))
    assert_close(module(x), torch.einsum("bcij,bci,bcj->bcij", x, rows, columns), 1e-6)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (3, 20), (10, 10)])
def test_mlca_pooling_equals_adaptive_pooling(height, width):
    module, x = built("MLCA"), torch.randn(2, CHANNELS, height, width)
    local = F.adaptive_avg_pool2d(x, 5)

    def over_channels(conv, v):
        lines = F.conv1d(v.flatten(2).transpose(1, 2).reshape(-1, 1, CHANNELS), conv.weight, padding=conv.padding)
        return torch.sigmoid(lines).reshape(v.shape[0], -1, CHANNELS).transpose(1, 2).reshape(v.shape)

    gate = 0.5 * over_channels(module.conv_local, local) + 0.5 * over_channels(module.conv, local.mean((2, 3), keepdim=True))
    assert_close(module(x), x * F.adaptive_avg_pool2d(gate, (height, width)), 1e-5)


def test_caa_equals_its_formula(x):
    module = built("CAA")
    padded = F.pad(x, (3, 3, 3, 3))
    mean = sum(padded[:, :, i : i + HEIGHT, j : j + WIDTH] for i in range(7) for j in range(7)) / 49
    assert_close(module(x), x * torch.sigmoid(module.conv2(module.v_conv(module.h_conv(module.conv1(mean))))), 1e-5)


def test_cpca_equals_its_formula(x):
    module = built("CPCA")

    def mlp(v):
        return linear(module.fc2, linear(module.fc1, v).clamp(min=0))

    flat = x.flatten(2)
    y = x * torch.sigmoid(mlp(flat.mean(2, keepdim=True)) + mlp(flat.max(2, keepdim=True).values))[..., None]
    near = module.near(y)
    spread = near + module.strips[0](near) + module.strips[1](near) + module.strips[2](near)
    assert_close(module(x), y * linear(module.mix, spread.flatten(2)).reshape(x.shape), 1e-5)


def test_sk_chooses_between_a_plain_and_a_dilated_kernel(x):
    module = built("SK")
    assert [conv.conv.dilation for conv in module.convs] == [(1, 1), (2, 2)]
    maps = [conv(x) for conv in module.convs]
    fused = module.fc((maps[0] + maps[1]).mean((2, 3), keepdim=True))
    choice = F.softmax(torch.stack([linear(fc, fused.flatten(2)) for fc in module.fcs]), 0)[..., None]
    assert_close(module(x), choice[0] * maps[0] + choice[1] * maps[1], 1e-5)


def test_danet_equals_its_formula(x):
    module = built("DANet")
    v = x.flatten(2)
    query, key, value = (linear(layer, v) for layer in (module.query_conv, module.key_conv, module.value_conv))
    position = value @ F.softmax(query.transpose(1, 2) @ key, 2).transpose(1, 2)
    energy = v @ v.transpose(1, 2)
    channel = F.softmax(energy.max(2, keepdim=True).values - energy, 2) @ v
    expected = module.position_out(x + module.alpha * position.reshape(x.shape))
    expected = expected + module.channel_out(x + module.beta * channel.reshape(x.shape))
    assert_close(module(x), expected, 1e-5)


def test_cot_mixes_neighbours_by_local_matrices(x):
    module = built("CoTAttention")
    static, value = module.key_embed(x), module.value_embed(x)
    matrices = module.attention_embed(torch.cat((static, x), 1)).reshape(2, module.heads, 9, HEIGHT, WIDTH)
    neighbours = F.unfold(value, 3, padding=1).reshape(2, module.heads, -1, 9, HEIGHT, WIDTH)
    dynamic = F.silu(module.bn(torch.einsum("bhkij,bhckij->bhcij", matrices, neighbours).reshape(x.shape)))
    choice = F.softmax(module.fuse((static + dynamic).mean((2, 3), keepdim=True)).reshape(2, 2, CHANNELS, 1, 1), 1)
    assert_close(module(x), static * choice[:, 0] + dynamic * choice[:, 1], 1e-5)


def test_psa_attends_with_half_of_the_channels(x):
    module = built("PSA")
    kept, v = module.cv1(x).chunk(2, 1)
    width = v.shape[1]
    query, key, value = module.attn.qkv(v).flatten(2).split([width // 2, width // 2, width], 1)
    weights = F.softmax(query.transpose(1, 2) @ key / math.sqrt(width // 2), 2)
    out = (value @ weights.transpose(1, 2)).reshape(v.shape)
    v = v + module.attn.proj(out + module.attn.pe(value.reshape(v.shape)))
    assert_close(module(x), module.cv2(torch.cat((kept, v + module.ffn(v)), 1)), 1e-5)


@pytest.mark.parametrize(("height", "area"), [(8, 1), (8, 4), (6, 4), (7, 4), (5, 4), (1, 4)])
def test_area_attention_is_confined_to_runs_of_pixels(height, area):
    """Equal runs row by row, the last ones shorter or empty; on 8 rows four stripes, on 6 x 3 pixels runs that begin within rows."""
    module, x = built("AreaAttention", None, area, channels=64), torch.randn(2, 64, height, 3)
    pixels = height * 3
    run = -(-pixels // area)
    query, key, value = module.qkv(x).reshape(2, 2, 3, 32, pixels).unbind(2)
    out = torch.zeros_like(value)
    for start in range(0, pixels, run):
        q, k, v = (part[..., start : start + run] for part in (query, key, value))
        weights = F.softmax(torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(32), 3)
        out[..., start : start + run] = torch.einsum("bhij,bhdj->bhdi", weights, v)
    value = value.reshape(x.shape)
    assert_close(module(x), module.proj(out.reshape(x.shape) + module.pe(value)), 1e-5)


def test_mobilevit_attends_pixels_at_equal_patch_positions():
    module, x = built("MobileViTAttention"), torch.randn(1, CHANNELS, 6, 5)
    other = x.clone()
    other[0, :, 0, 0] += 1.0
    tokens = []
    module.norm.register_forward_hook(lambda layer, inputs, output: tokens.append(output))
    module.local = torch.nn.Identity()
    module(x)
    module(other)
    changed = (tokens[0] - tokens[1]).abs().amax((1, 2))  # (places of a patch, patches)
    assert (changed[0, [0, 1, 3, 4]] > 0).all()
    assert changed[1:].max() == 0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (3, 2), (9, 8)])
def test_mirroring_equals_reflection_padding_also_on_small_maps(height, width):
    x = torch.arange(float(height * width)).reshape(1, 1, height, width)
    padded = shared.reflect_pad(x, 3)
    assert padded.shape == (1, 1, height + 6, width + 6)
    if min(height, width) > 3:
        assert torch.equal(padded, F.pad(x, (3, 3, 3, 3), mode="reflect"))
    else:
        assert set(padded.flatten().tolist()) == set(x.flatten().tolist())


@pytest.mark.parametrize("align_corners", [True, False])
def test_sampling_by_gathers_equals_the_kernel(x, align_corners):
    grid = torch.rand(2, 4, 3, 2) * 3 - 1.5
    x.requires_grad_()
    grid.requires_grad_()
    ways = [way(x, grid, align_corners=align_corners) for way in (shared.sample_bilinear, shared._sample_by_gather)]
    assert_close(ways[1], ways[0].detach(), 1e-5)
    (first, second) = (torch.autograd.grad(y.square().sum(), (x, grid)) for y in ways)
    for a, b in zip(second, first):
        assert_close(a, b, 1e-4)


def test_deformable_convolution_by_gathers_equals_the_kernel(x):
    layer = fill_(BLOCKS["DeformableLKA"].cls(CHANNELS)).conv_spatial
    offset = 3 * layer.offset_net(x)
    assert_close(layer._by_gathers(x, offset, layer.deform_conv.weight), layer_with(layer, x, offset), 1e-5)


def layer_with(layer, x: Tensor, offset: Tensor) -> Tensor:
    from torchvision.ops import deform_conv2d

    return deform_conv2d(x, offset, layer.deform_conv.weight, padding=layer.deform_conv.padding, dilation=layer.deform_conv.dilation)


def test_msda_does_not_modify_its_input(x):
    module, before = built("MSDA"), x.clone()
    module(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("name", "options"), [("SwinBlock", {"shift_size": 3}), ("SwinBlock", {"window_size": 4, "shift_size": 2})])
def test_shifted_windows_follow_the_size_in_a_traced_graph(name, options):
    module = built(name, **options)
    with torch.no_grad():
        traced = torch.jit.trace(module, torch.randn(1, CHANNELS, 13, 20), check_trace=False)
        for size in ((13, 20), (7, 9), (4, 30), (3, 3)):
            x = torch.randn(2, CHANNELS, *size)
            assert_close(traced(x), module(x), 1e-5, f"{name} {size}")


def test_padding_of_a_window_is_not_attended():
    small, large = built("SwinWindowAttention", 3), built("SwinWindowAttention", 7)
    index = large.relative_position_index.reshape(7, 7, 7, 7)[:3, :3, :3, :3].reshape(9, 9)
    with torch.no_grad():
        small.relative_position_bias_table[small.relative_position_index.flatten()] = large.relative_position_bias_table[index.flatten()]
    x = torch.randn(1, CHANNELS, 3, 3)
    assert_close(large(x), small(x), 1e-5)


def test_one_image_trains_where_pooled_batch_norm_sees_one_value():
    for name in ("BAM", "SK", "GE", "CoTAttention"):
        module = built(name).train()
        module(torch.randn(1, CHANNELS, 6, 6)).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize(("channels", "groups"), [(16, 16), (24, 24), (48, 24), (64, 32)])
def test_ema_accepts_widths_not_divisible_by_its_factor(channels, groups):
    module = built("EMA", channels=channels)
    assert module.groups == groups
    assert module(torch.randn(1, channels, 4, 5)).shape == (1, channels, 4, 5)


@pytest.mark.parametrize(("name", "options"), [
    ("LSKA", {"k_size": 9}), ("MSDA", {"num_heads": 5}), ("SwinBlock", {"shift_size": 7}),
    ("GE", {"extent": 3}), ("EMA", {"c2": 8}), ("CoordAtt", {"oup": 8}), ("GAM", {"c2": 8}), ("AxialAttention", {"num_dimensions": 3}),
    ("SpatialAttention", {"kernel_size": 5}), ("AreaAttention", {"num_heads": 3}),
    ("FasterNetBlock", {"norm_layer": "LayerNorm"}), ("PConv", {"n_div": 32}),
])  # fmt: skip
def test_invalid_options_are_refused_with_a_message(name, options):
    with pytest.raises(ValueError, match=r"\w+ .* \w+"):
        built(name, **options)


@pytest.mark.parametrize(
    ("name", "args"), [("RepVGGBlock", (16,)), ("RepVGGBlock", (24, 3, 2)), ("VanillaBlock", (24, 2)), ("VanillaBlock", (24, 2, 1))]
)
def test_blocks_of_backbones_fold_for_inference(name, args, x):
    module = built(name, *args)
    folded = module.fused()
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in module.parameters())
    assert_close(folded(x), module(x), 1e-5, name)


def test_a_leaky_vanilla_block_does_not_fold():
    module = built("VanillaBlock", 24, act_learn=0.5)
    assert module.fused() is module
