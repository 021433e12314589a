"""Options of part A and B that no golden vector covers, against sums over pixels and channels written straight from the equations.

Nothing here calls a convolution, a pooling, a norm or an attention of torch; every product is an einsum over shifted slices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.layers.attention.acmix import ACmix
from models.layers.attention.botnet import BoTPaperBlock
from models.layers.attention.cloformer import CloAttention, CloBlock, ConvFFN
from models.layers.attention.focalnet import FocalModulation, FocalModulationBlock
from models.layers.attention.nonlocal_block import MODES, NLBlockND
from tests.golden import assert_close, fill_

Rule = Callable[[Any, Tensor], Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def check(module: nn.Module, rule: Rule, *shape: int, tol: float = 1e-9) -> None:
    """Output and input gradient of a filled module against a rule; every parameter's gradient is finite."""
    module = fill_(module).double().eval()
    x = randn(*shape).requires_grad_()
    got, expected = module(x), rule(module, x)
    assert_close(got, expected, tol, "output")
    weight = randn(*got.shape)
    (of_rule,) = torch.autograd.grad((expected * weight).sum(), x)
    (got * weight).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, of_rule, 10 * tol, "gradient")
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def point(layer: Any, x: Tensor) -> Tensor:
    """Σ_c w[o, c] x[c] + b[o] at every place of (B, C, ...)."""
    y = torch.einsum("oc,bc...->bo...", layer.weight.flatten(1), x)
    return y if layer.bias is None else y + layer.bias.view(1, -1, *[1] * (x.dim() - 2))


def spread(layer: Any, x: Tensor, *, stride: int = 1, groups: int = 1) -> Tensor:
    """A convolution with zero padding of half its kernel, one offset of the kernel at a time."""
    kernel = layer.weight.shape[-1]
    half, (height, width) = kernel // 2, x.shape[-2:]
    padded = x.new_zeros(*x.shape[:2], height + 2 * half, width + 2 * half)
    padded[..., half : half + height, half : half + width] = x
    total = 0
    for dy, dx in itertools.product(range(kernel), repeat=2):
        part = padded[..., dy : dy + height : stride, dx : dx + width : stride].unflatten(1, (groups, -1))
        weight = layer.weight[..., dy, dx].unflatten(0, (groups, -1))
        total = total + torch.einsum("goc,bgchw->bgohw", weight, part).flatten(1, 2)
    return total if layer.bias is None else total + layer.bias[:, None, None]


def depthwise(layer: Any, x: Tensor, *, stride: int = 1) -> Tensor:
    return spread(layer, x, stride=stride, groups=x.shape[1])


def normed(x: Tensor, dims: tuple[int, ...], layer: Any) -> Tensor:
    """Mean 0 and variance 1 over ``dims``, then the layer's scale and shift of each channel."""
    centred = x - x.mean(dims, keepdim=True)
    y = centred / (centred.square().mean(dims, keepdim=True) + layer.eps).sqrt()
    return y * layer.weight[:, None, None] + layer.bias[:, None, None]


def batch_normed(x: Tensor, layer: Any) -> Tensor:
    ways = [v.view(1, -1, *[1] * (x.dim() - 2)) for v in (layer.running_mean, layer.running_var, layer.weight, layer.bias)]
    return (x - ways[0]) / (ways[1] + layer.eps).sqrt() * ways[2] + ways[3]


# --- non-local -------------------------------------------------------------------------------------------------------------------------


def nonlocal_rule(module: NLBlockND, x: Tensor) -> Tensor:
    """y_i = Σ_j f(x_i, x_j) g(x_j) / C(x), one i at a time (equations 1 to 6)."""
    g = point(module.g, x).flatten(2)
    theta, phi = (x, x) if module.mode == "gaussian" else (point(module.theta, x), point(module.phi, x))
    theta, phi = theta.flatten(2), phi.flatten(2)
    if module.sub_sample:
        phi, g = (_subsampled(part.unflatten(2, x.shape[2:])) for part in (phi, g))
    columns = []
    for i in range(theta.shape[2]):
        if module.mode == "concatenate":
            layer = module.W_f[0]
            both = torch.cat([theta[:, :, i : i + 1].expand_as(phi), phi], 1)
            f = (torch.einsum("c,bcj->bj", layer.weight.flatten(), both) + layer.bias).clamp(min=0)
        else:
            f = torch.einsum("bc,bcj->bj", theta[:, :, i], phi)
        if module.mode in ("gaussian", "embedded"):
            f = (f - f.amax(1, keepdim=True)).exp()
            f = f / f.sum(1, keepdim=True)
        else:
            f = f / f.shape[1]
        columns.append(torch.einsum("bj,bcj->bc", f, g))
    y = torch.stack(columns, 2).reshape(*x.shape[:1], -1, *x.shape[2:])
    if isinstance(module.W_z, nn.Sequential):
        return batch_normed(point(module.W_z[0], y), module.W_z[1]) + x
    return point(module.W_z, y) + x


def _subsampled(maps: Tensor) -> Tensor:
    """The maximum of each 2 x 2 pixels, of each pair of a line, or of each 2 x 2 pixels of each frame: (B, C, *space) -> (B, C, M)."""
    frames = maps.reshape(*maps.shape[:2], -1, *maps.shape[-2:]) if maps.dim() > 3 else maps[:, :, None, None]
    height, width = frames.shape[-2:]
    cuts = itertools.product(range(frames.shape[2]), range(0, height, 2), range(0, width, 2))
    return torch.stack([frames[:, :, t, r : r + 2, c : c + 2].flatten(2).max(2).values for t, r, c in cuts], 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("space", [(7,), (1,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("options", [
    {"bn_layer": False}, {"inter_channels": 3}, {"inter_channels": 7, "bn_layer": False}, {"sub_sample": True},
])  # fmt: skip
def test_nonlocal_block(mode, space, options):
    module = NLBlockND(4, mode=mode, dimension=len(space), **options)
    check(module, nonlocal_rule, 2, 4, *space, tol=2e-5 if mode == "concatenate" else 1e-9)  # its sums are taken in float32


def test_nonlocal_block_of_one_channel():
    check(NLBlockND(1), nonlocal_rule, 2, 1, 2, 3)


# --- ACmix -----------------------------------------------------------------------------------------------------------------------------


def mirrored(place: int, size: int) -> int:
    """Index of a pixel beyond the border, which the map is mirrored at."""
    while not 0 <= place < size:
        place = -place if place < 0 else 2 * (size - 1) - place
    return place


def acmix_rule(module: ACmix, x: Tensor) -> Tensor:
    """α Σ_n softmax_n(q_i · (k_n + p_i - p_n) / √d) v_n + β conv (equations 10 to 13), one pixel and neighbour at a time."""
    heads, stride = module.heads, module.stride
    query, key, value = (point(layer, x).unflatten(1, (heads, -1)) for layer in (module.conv1, module.conv2, module.conv3))
    height, width = x.shape[-2:]
    places = torch.stack([torch.stack([_line(width)[c], _line(height)[r]]) for r in range(height) for c in range(width)], 1)
    position = point(module.conv_p, places[None])[0].unflatten(1, (height, width))  # (d, H, W)
    half = module.kernel_att // 2
    rows, columns = range(0, height, stride), range(0, width, stride)
    attended = x.new_zeros(x.shape[0], heads, query.shape[2], len(rows), len(columns))
    for (a, r), (b, c) in itertools.product(enumerate(rows), enumerate(columns)):
        near = [
            (mirrored(r + dy * module.dilation, height), mirrored(c + dx * module.dilation, width))
            for dy in range(-half, half + 1)
            for dx in range(-half, half + 1)
        ]
        keys = torch.stack([key[..., y, z] + position[:, r, c] - position[:, y, z] for y, z in near], 3)  # (B, heads, d, neighbours)
        logits = torch.einsum("bhd,bhdn->bhn", query[..., r, c], keys) / math.sqrt(query.shape[2])
        weights = logits.exp() / logits.exp().sum(2, keepdim=True)
        attended[..., a, b] = torch.einsum("bhn,bhdn->bhd", weights, torch.stack([value[..., y, z] for y, z in near], 3))
    mixed = torch.einsum("tm,bmdhw->bdthw", module.fc.weight.flatten(1), torch.cat([query, key, value], 1))  # kernel place t innermost
    convolved = spread(module.dep_conv, mixed.flatten(1, 2), stride=stride, groups=query.shape[2])
    return module.rate1 * attended.flatten(1, 2) + module.rate2 * convolved


def _line(count: int) -> Tensor:
    return torch.linspace(-1, 1, count, dtype=torch.float64)


@pytest.mark.parametrize(("widths", "size", "options"), [
    ((6, 8), (3, 4), {"head": 2, "kernel_att": 3}),
    ((6, 8), (4, 6), {"head": 4, "kernel_att": 3, "stride": 2}),
    ((3, 6), (5, 3), {"head": 3, "kernel_att": 5, "stride": 2}),
    ((6, 8), (4, 5), {"head": 1, "kernel_att": 3, "dilation": 2}),
    ((6, 8), (7, 5), {"head": 2, "kernel_att": 3, "dilation": 2, "stride": 2}),
    ((6, 8), (3, 2), {"head": 2, "kernel_att": 7}),
    ((6, 8), (5, 4), {"head": 8, "kernel_att": 1}),
    ((6, 8), (7, 7), {"head": 2, "kernel_att": 3, "stride": 3}),
])  # fmt: skip
def test_acmix(widths, size, options):
    check(ACmix(*widths, **options), acmix_rule, 2, widths[0], *size, tol=2e-6)  # positions are float32 numbers


# --- focal modulation ------------------------------------------------------------------------------------------------------------------


def focal_rule(module: FocalModulation, x: Tensor) -> Tensor:
    """proj(q · h(Σ_l g_l z_l)), z_l = GELU(depthwise(z_(l-1))), z_(L+1) = GELU(mean(z_L)) (equations 4 to 7)."""
    channels, levels = x.shape[1], len(module.focal_layers)
    rows = point(module.f, x)
    query, z, gates = rows[:, :channels], rows[:, channels : 2 * channels], rows[:, 2 * channels :]
    total = 0
    for level in range(levels):
        z = gelu(depthwise(module.focal_layers[level][0], z))
        total = total + gates[:, level : level + 1] * z
    total = total + gates[:, levels:] * gelu(z.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3]))
    scaled = total * module.modulator_scale
    y = query * point(module.h, scaled)
    return point(module.proj, y if isinstance(module.ln, nn.Identity) else normed(y, (1,), module.ln))


@pytest.mark.parametrize("options", [
    {"focal_window": 5}, {"focal_window": 1, "focal_level": 1}, {"focal_level": 3}, {"focal_factor": 4}, {"focal_factor": 0},
    {"focal_window": 5, "focal_factor": -2}, {"bias": False}, {"use_postln_in_modulation": True}, {"normalize_modulator": True},
    {"bias": False, "use_postln_in_modulation": True, "normalize_modulator": True, "focal_level": 3},
])  # fmt: skip
@pytest.mark.parametrize("size", [(5, 7), (1, 2)])
def test_focal_modulation(options, size):
    check(FocalModulation(4, **options), focal_rule, 2, 4, *size)


def test_options_of_focal_modulation_are_seen_in_its_structure():
    module = FocalModulation(4, focal_window=5, focal_level=3, focal_factor=4, bias=False, normalize_modulator=True)
    assert [layer[0].kernel_size for layer in module.focal_layers] == [(5, 5), (9, 9), (13, 13)]
    assert module.modulator_scale == 1 / 4
    assert {key for key in module.state_dict() if "bias" in key} == {"proj.bias"}


def focal_block_rule(module: FocalModulationBlock, x: Tensor) -> Tensor:
    def mlp(y: Tensor) -> Tensor:
        return point(module.mlp.fc2, gelu(point(module.mlp.fc1, y)))

    branches = ((module.norm1, lambda y: focal_rule(module.modulation, y), module.gamma_1), (module.norm2, mlp, module.gamma_2))
    for norm, layer, gamma in branches:
        y = normed(layer(x), (1,), norm) if module.use_postln else layer(normed(x, (1,), norm))
        x = x + (y if gamma is None else gamma[:, None, None] * y)
    return x


@pytest.mark.parametrize("options", [
    {"mlp_ratio": 1.5}, {"use_postln": True}, {"use_layerscale": True, "layerscale_value": 0.5}, {"focal_level": 3, "focal_window": 1},
    {"use_layerscale": True, "use_postln": True}, {"use_postln_in_modulation": True}, {"normalize_modulator": True, "mlp_ratio": 2.0},
])  # fmt: skip
def test_focal_modulation_block(options):
    check(FocalModulationBlock(4, **options), focal_block_rule, 2, 4, 3, 5)
    block = FocalModulationBlock(4, **options)
    assert block.mlp.fc1.out_features == int(4 * options.get("mlp_ratio", 4.0))
    value = options.get("layerscale_value", 1e-4)
    assert block.gamma_1 is None or torch.equal(block.gamma_1, torch.full((4,), value))


# --- CloFormer -------------------------------------------------------------------------------------------------------------------------


def clo_rule(module: CloAttention, x: Tensor) -> Tensor:
    """Heads of tanh(act(q ⊙ k) / √d) ⊙ v, then heads of softmax attention to the means of windows, then the projection."""
    parts = []
    for qkv, conv, act in zip(module.qkvs, module.convs, module.act_blocks):
        q, k, v = depthwise(conv, point(qkv, x)).chunk(3, 1)
        first, _, second = act.act_block
        inner = point(first, q * k)
        parts.append(torch.tanh(point(second, inner / (1 + (-inner).exp())) / math.sqrt(module.dim_head)) * v)
    if module.global_heads:
        size, (height, width) = module.window_size, x.shape[-2:]
        cuts = itertools.product(range(0, height, size), range(0, width, size))
        pooled = torch.stack([x[..., r : r + size, c : c + size].flatten(2).mean(2) for r, c in cuts], 2)  # (B, C, windows)
        key, value = (part.unflatten(1, (module.global_heads, -1)) for part in point(module.global_kv, pooled).chunk(2, 1))
        query = point(module.global_q, x).unflatten(1, (module.global_heads, -1))
        weights = torch.einsum("bndhw,bndk->bnkhw", query, key / math.sqrt(module.dim_head)).exp()
        parts.append(torch.einsum("bnkhw,bndk->bndhw", weights / weights.sum(2, keepdim=True), value).flatten(1, 2))
    return point(module.proj, torch.cat(parts, 1))


@pytest.mark.parametrize("options", [
    {}, {"num_heads": 2}, {"num_heads": 4, "group_split": [1, 2, 1], "kernel_sizes": [3, 7]}, {"qkv_bias": False, "window_size": 2},
    {"group_split": [0, 5, 3], "kernel_sizes": [3, 1], "window_size": 3}, {"group_split": [8, 0]}, {"group_split": [0, 8]},
    {"window_size": 1, "num_heads": 1, "group_split": [0, 1]}, {"kernel_sizes": [3, 5, 7]}, {"window_size": 9},
])  # fmt: skip
@pytest.mark.parametrize("size", [(5, 8), (1, 3)])
def test_clo_attention(options, size):
    check(CloAttention(8, **options), clo_rule, 2, 8, *size)


def ffn_rule(module: ConvFFN, x: Tensor) -> Tensor:
    return point(module.fc2, depthwise(module.dwconv, gelu(point(module.fc1, x)), stride=module.dwconv.stride[0]))


@pytest.mark.parametrize(("options", "out"), [
    ({}, (4, 5, 6)), ({"hidden_channels": 3, "kernel_size": 3}, (4, 5, 6)), ({"stride": 2}, (4, 3, 3)), ({"out_channels": 7}, (7, 5, 6)),
    ({"stride": 3, "kernel_size": 7, "out_channels": 2}, (2, 2, 2)), ({"kernel_size": 1}, (4, 5, 6)),
])  # fmt: skip
def test_clo_feed_forward(options, out):
    module = ConvFFN(4, **options)
    check(module, ffn_rule, 2, 4, 5, 6)
    assert module.double()(randn(2, 4, 5, 6)).shape == (2, *out)


def clo_block_rule(module: CloBlock, x: Tensor) -> Tensor:
    x = x + clo_rule(module.attn, normed(x, (1, 2, 3), module.norm1))
    down = x
    if isinstance(module.downsample, nn.Sequential):
        conv, norm, last = module.downsample
        down = point(last, batch_normed(spread(conv, x, stride=2), norm))
    return down + ffn_rule(module.mlp, normed(x, (1, 2, 3), module.norm2))


@pytest.mark.parametrize("options", [
    {"mlp_kernel_size": 3, "mlp_ratio": 1.5}, {"stride": 2}, {"stride": 2, "out_dim": 5, "mlp_kernel_size": 3}, {"qkv_bias": False},
    {"num_heads": 4, "group_split": [1, 1, 2], "kernel_sizes": [3, 5], "window_size": 2, "stride": 2, "out_dim": 12},
])  # fmt: skip
@pytest.mark.parametrize("size", [(5, 6), (1, 4)])
def test_clo_block(options, size):
    module = CloBlock(8, **options)
    check(module, clo_block_rule, 2, 8, *size)
    assert module.mlp.fc1.out_channels == int(8 * options.get("mlp_ratio", 4.0))


# --- bottleneck transformer ------------------------------------------------------------------------------------------------------------


def bot_rule(module: BoTPaperBlock, x: Tensor) -> Tensor:
    """conv, attention, mean of 2 x 2, conv, and the shortcut (figures 3 and 4); one pair of pixels at a time."""
    first, norm1, _, attention, pool, norm2, _, last, norm3 = module.net
    y = batch_normed(point(first, x), norm1).clamp(min=0)
    y = _bot_attention(attention, y)
    strided = not isinstance(pool, nn.Identity)
    if strided:
        height, width = y.shape[-2:]
        y = torch.stack([torch.stack([y[..., r : r + 2, c : c + 2].flatten(2).mean(2) for c in range(0, width, 2)], 2)
                         for r in range(0, height, 2)], 2)  # fmt: skip
    y = batch_normed(point(last, batch_normed(y, norm2).clamp(min=0)), norm3)
    if isinstance(module.shortcut, nn.Identity):
        return (y + x).clamp(min=0)
    conv, norm, _ = module.shortcut
    return (y + batch_normed(spread(conv, x, stride=2 if strided else 1), norm).clamp(min=0)).clamp(min=0)


def _bot_attention(module: Any, x: Tensor) -> Tensor:
    heads, width = module.heads, module.dim_head
    q, k, v = (part.unflatten(1, (heads, width)) for part in point(module.to_qkv, x).chunk(3, 1))
    places = list(itertools.product(range(x.shape[2]), range(x.shape[3])))
    out = torch.zeros_like(q)
    for r, c in places:
        keys = []
        for r2, c2 in places:
            table = module.pos_emb
            if hasattr(table, "rel_height"):
                rows, columns = (len(t) // 2 for t in (table.rel_height, table.rel_width))
                position = table.rel_height[r2 - r + rows] + table.rel_width[c2 - c + columns]
            else:
                position = table.height[r2] + table.width[c2]
            keys.append(k[..., r2, c2] + position)
        logits = torch.einsum("bhd,bhdn->bhn", q[..., r, c], torch.stack(keys, 3)) / math.sqrt(width)
        weights = logits.exp() / logits.exp().sum(2, keepdim=True)
        out[..., r, c] = torch.einsum("bhn,bhdn->bhd", weights, torch.stack([v[..., y, z] for y, z in places], 3))
    return out.flatten(1, 2)


@pytest.mark.parametrize("options", [
    {"downsample": True}, {"downsample": True, "rel_pos_emb": False}, {}, {"rel_pos_emb": False, "heads": 1}, {"dim_out": 12},
    {"proj_factor": 2, "dim_head": 3, "heads": 2}, {"proj_factor": 1, "dim_out": 6, "downsample": True},
])  # fmt: skip
@pytest.mark.parametrize("size", [(4, 3), (3, 5), (1, 2)])
def test_bottleneck_transformer_block(options, size):
    options = {"dim_out": 8, "dim_head": 4, **options}
    check(BoTPaperBlock(8, fmap_size=size, **options), bot_rule, 2, 8, *size, tol=2e-7)  # tables are placed in float32
