"""The lean forms of part A against the papers' formulas written out, in float64, at sizes and layouts that no golden has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.layers.attention.bilevel_routing import BiLevelRoutingAttention
from models.layers.attention.bilevel_routing_nchw import BiLevelRoutingAttentionNCHW
from models.layers.attention.botnet import MHSA, BoT3, BoTPaperAttention, BottleneckTransformer
from models.layers.attention.cloformer import CloAttention, CloBlock
from models.layers.attention.focalnet import FocalModulation
from models.layers.attention.nonlocal_block import MODES, NLBlockND, pairwise_relu_sum, prefix_sum
from models.layers.attention.ops.common import DropPath, attend, from_windows, resize_matrix, take_rows, to_windows
from models.layers.attention.ops.identity import IdentityStart
from models.layers.attention.ops.routing import adaptive_mean, routed_attention
from tests.golden import assert_close, fill_


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 200])
def test_pairwise_relu_sum_is_exact_with_its_gradients(count):
    a, b = randn(2, count, seed=1).requires_grad_(), randn(2, count, seed=2).requires_grad_()
    value, weight = randn(2, count, 3, seed=3).requires_grad_(), randn(2, count, 3, seed=4)
    plain = F.relu(a.unsqueeze(2) + b.unsqueeze(1)) @ value
    lean = pairwise_relu_sum(a, b, value)
    assert_close(lean, plain, 1e-12)
    for got, expected in zip(gradients((lean * weight).sum(), [a, b, value]), gradients((plain * weight).sum(), [a, b, value])):
        assert_close(got, expected, 1e-12)


def test_pairwise_relu_sum_of_equal_terms():
    """Ties between b and -a are worth nothing, on whichever side the sort puts them."""
    a, b, value = torch.zeros(1, 5), torch.zeros(1, 5), torch.ones(1, 5, 2)
    assert torch.equal(pairwise_relu_sum(a, b, value), torch.zeros(1, 5, 2))


def test_pairwise_relu_sum_in_single_precision_at_many_positions():
    a, b, value = (randn(1, *shape, seed=i) for i, shape in enumerate([(3000,), (3000,), (3000, 2)]))
    plain = F.relu(a.unsqueeze(2) + b.unsqueeze(1)) @ value
    assert_close(pairwise_relu_sum(a.float(), b.float(), value.float()), plain, 1e-5)


@pytest.mark.parametrize("count", [1, 64, 100, 300])
def test_prefix_sum_equals_cumsum(count):
    x = randn(2, count, 3)
    assert_close(prefix_sum(x), x.cumsum(1), 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dimension", "space"), [(1, (19,)), (2, (5, 7)), (3, (2, 3, 5))])
def test_nonlocal_is_the_pairwise_sum(mode, dimension, space):
    block = fill_(NLBlockND(8, mode=mode, dimension=dimension)).double().eval()
    x = randn(2, 8, *space)
    g = block.g(x).flatten(2).transpose(1, 2)
    theta, phi = (x, x) if mode == "gaussian" else (block.theta(x), block.phi(x))
    theta, phi = theta.flatten(2).transpose(1, 2), phi.flatten(2).transpose(1, 2)
    count = g.shape[1]
    if mode == "concatenate":
        pairs = torch.cat([theta.unsqueeze(2).expand(-1, -1, count, -1), phi.unsqueeze(1).expand(-1, count, -1, -1)], dim=-1)
        weights = F.relu(pairs @ block.W_f[0].weight.flatten() + block.W_f[0].bias) / count
    else:
        weights = theta @ phi.transpose(1, 2)
        weights = weights / count if mode == "dot" else weights.softmax(-1)
    expected = block.W_z((weights @ g).transpose(1, 2).reshape(2, 4, *space)) + x
    assert_close(block(x), expected, 1e-5 if mode == "concatenate" else 1e-10)  # its sums are taken in float32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bn_layer", [True, False])
def test_nonlocal_starts_as_the_identity(mode, bn_layer):
    x = torch.randn(2, 8, 6, 5)
    assert torch.equal(NLBlockND(8, mode=mode, bn_layer=bn_layer)(x), x)


def test_nonlocal_refuses_unknown_options():
    with pytest.raises(ValueError, match="gausian"):
        NLBlockND(8, mode="gausian")
    with pytest.raises(ValueError, match="dimension 4"):
        NLBlockND(8, dimension=4)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_attend_is_softmax_attention_of_unequal_widths(memory):
    query, key, value = randn(2, 12, 4, 6), randn(2, 12, 3, 5, seed=1), randn(2, 20, 3, 5, seed=2)
    query, key, value = (x.contiguous(memory_format=memory) for x in (query, key, value))
    q, k, v = (x.flatten(2).unflatten(1, (2, -1)).transpose(2, 3) for x in (query, key, value))
    expected = ((q @ k.transpose(2, 3)) * 0.3).softmax(-1) @ v
    got = attend(query, key, value, heads=2, scale=0.3)
    assert_close(got, expected.transpose(2, 3).reshape(2, 20, 4, 6), 1e-12)


def test_windows_round_trip():
    x = randn(2, 3, 8, 6)
    windows = to_windows(x, 4, 3)
    assert windows.shape == (2, 4, 12, 3)
    assert torch.equal(windows[0, 1], x[0, :, :4, 3:].flatten(1).T)
    assert torch.equal(from_windows(windows, 4, 3, columns=2), x)


def test_take_rows_and_its_gradient():
    table, index = randn(2, 4, 3).requires_grad_(), torch.tensor([[0, 0, 3], [2, 1, 2]])
    rows = take_rows(table, index)
    assert torch.equal(rows, torch.stack([table[i][index[i]] for i in range(2)]))
    rows.sum().backward()
    assert torch.equal(table.grad[:, :, 0], torch.tensor([[2.0, 0, 0, 1], [0, 1, 2, 0]], dtype=torch.float64))


@pytest.mark.parametrize(("size", "bins"), [(8, 4), (7, 3), (3, 4), (1, 4)])
def test_adaptive_mean_is_adaptive_average_pooling(size, bins):
    x = randn(2, size, 5)
    expected = F.adaptive_avg_pool1d(x.transpose(1, 2), bins).transpose(1, 2)
    assert_close(adaptive_mean(x, size, bins), expected, 1e-12)


def test_resize_matrix_preserves_centre_and_ends():
    table = randn(5, 1)
    assert torch.equal(resize_matrix(5, 5, table), torch.eye(5, dtype=torch.float64))
    assert torch.allclose(resize_matrix(5, 9, table) @ table, F.interpolate(table.T[None], size=9, mode="linear", align_corners=True)[0].T)
    assert torch.equal(resize_matrix(5, 1, table) @ table, table[2:3])


def test_routing_attends_to_the_chosen_windows_only():
    query, keys, values = randn(1, 4, 3, 8), randn(1, 4, 3, 8, seed=1), randn(1, 4, 3, 8, seed=2)
    index = torch.tensor([[[1, 2], [0, 3], [3, 1], [2, 2]]])
    out = routed_attention(query, keys, values, index, heads=2, scale=0.5)
    for window in range(4):
        key, value = (part[0, index[0, window]].flatten(0, 1) for part in (keys, values))
        for head in (slice(0, 4), slice(4, 8)):
            weights = ((query[0, window, :, head] @ key[:, head].T) * 0.5).softmax(-1)
            assert_close(out[0, window, :, head], weights @ value[:, head], 1e-12)


@pytest.mark.parametrize("block", [BiLevelRoutingAttention, BiLevelRoutingAttentionNCHW])
@pytest.mark.parametrize("size", [(20, 20), (3, 2), (1, 9), (14, 21)])
def test_bilevel_routing_accepts_every_size(block, size):
    x = torch.randn(1, 16, *size)
    assert block(16, num_heads=4)(x).shape == x.shape


@pytest.mark.parametrize("block", [BiLevelRoutingAttention, BiLevelRoutingAttentionNCHW])
def test_routing_does_not_depend_on_autocast(block):
    module = fill_(block(32, num_heads=4, n_win=4, topk=3)).eval()
    x = torch.randn(4, 32, 16, 16)

    def routes() -> torch.Tensor:
        if block is BiLevelRoutingAttention:
            return module._route(to_windows(x, 4, 4))[0]
        return module._route(x, 4, 4)

    expected = routes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(routes(), expected)


def test_soft_routing_trains_the_router():
    module = BiLevelRoutingAttention(16, num_heads=2, n_win=2, topk=2, soft_routing=True, diff_routing=True, param_routing=True)
    module(torch.randn(1, 16, 8, 8)).square().mean().backward()
    assert module.router.emb.weight.grad.abs().max() > 0


@pytest.mark.parametrize("mode", ["ada_avgpool", "avgpool", "maxpool"])
@pytest.mark.parametrize("size", [(20, 20), (3, 2)])
def test_subsampled_keys_keep_the_output_shape(mode, size):
    x = torch.randn(1, 16, *size)
    assert BiLevelRoutingAttention(16, kv_downsample_mode=mode, kv_downsample_ratio=2)(x).shape == x.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "5 heads do not divide 16"),
        ({"kv_downsample_mode": "fracpool"}, "fracpool"),
        ({"param_attention": "kv"}, "param_attention"),
        ({"diff_routing": True}, "soft_routing"),
    ],
)
def test_bilevel_routing_refuses_with_a_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        BiLevelRoutingAttention(16, **arguments)


def relative_logits(module: BoTPaperAttention, query: torch.Tensor) -> torch.Tensor:
    """q·(r_h[y' - y] + r_w[x' - x]), one pair of positions at a time: (B, heads, H, W, d) -> (B, heads, H, W, H, W)."""
    height, width = query.shape[2:4]
    out = query.new_zeros(*query.shape[:4], height, width)
    for y in range(height):
        for x in range(width):
            for y2 in range(height):
                for x2 in range(width):
                    r = module.pos_emb.rel_height[y2 - y + height - 1] + module.pos_emb.rel_width[x2 - x + width - 1]
                    out[:, :, y, x, y2, x2] = query[:, :, y, x] @ r
    return out


def test_paper_attention_has_the_relative_term():
    module = BoTPaperAttention(16, (3, 4), heads=2).double()
    x = randn(2, 16, 3, 4)
    query, key, value = (p.unflatten(1, (2, 8)).permute(0, 1, 3, 4, 2) for p in module.to_qkv(x).chunk(3, dim=1))
    query = query * 8**-0.5
    content = query.flatten(2, 3) @ key.flatten(2, 3).transpose(2, 3)
    weights = (content + relative_logits(module, query).flatten(4).flatten(2, 3)).softmax(-1)
    expected = (weights @ value.flatten(2, 3)).transpose(2, 3).reshape(2, 16, 3, 4)
    assert_close(module(x), expected, 1e-10)


def test_positions_follow_the_map():
    """A table made for another size gives the same attention as the resized table in a module made for this size."""
    large, small = MHSA(8, 10, 10, 2, pos_emb=True), MHSA(8, 5, 7, 2, pos_emb=True)
    small.load_state_dict({**large.state_dict(), "rel_w_weight": resize_matrix(10, 5, torch.ones(1)) @ large.rel_w_weight,
                           "rel_h_weight": large.rel_h_weight @ resize_matrix(10, 7, torch.ones(1)).T})  # fmt: skip
    x = torch.randn(1, 8, 5, 7)
    assert_close(large(x), small(x), 1e-5)


def test_bot3_output_depends_on_positions_from_the_start():
    block = BoT3(16, 16).eval()
    x = torch.randn(1, 16, 6, 6)
    before = block(x)
    block.m[0].cv2[0].rel_h_weight.data.mul_(3)
    assert not torch.allclose(block(x), before)
    assert not any("fc1" in key for key in block.state_dict())


@pytest.mark.parametrize("mhsa", [True, False])
def test_bottleneck_transformer_of_stride_two(mhsa):
    assert BottleneckTransformer(8, 16, stride=2, mhsa=mhsa)(torch.randn(2, 8, 7, 9)).shape == (2, 16, 4, 5)


@pytest.mark.parametrize("split", [[0, 4, 4], [4, 0, 4], [4, 4, 0], [0, 0, 8], None])
def test_clo_attention_with_empty_branches(split):
    x = torch.randn(1, 16, 20, 20)
    module = CloAttention(16, 8, split, [3, 5], window_size=8)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_clo_attention_handles_partial_windows():
    """At 20 x 20 and window 8 the last keys are the means of 4 px strips."""
    module = CloAttention(8, 2, [1, 1], [3], window_size=8).double()
    x = randn(1, 8, 20, 20)
    pooled = torch.stack([x[..., r : r + 8, c : c + 8].mean((2, 3)) for r in (0, 8, 16) for c in (0, 8, 16)], dim=2)
    key, value = module.global_kv(pooled.unsqueeze(3)).squeeze(3).chunk(2, dim=1)
    query = module.global_q(x).flatten(2)
    expected = value @ ((query.transpose(1, 2) @ key) * 4**-0.5).softmax(-1).transpose(1, 2)
    assert_close(module._global(x).flatten(2), expected, 1e-10)


def test_clo_modules_refuse_with_a_reason():
    with pytest.raises(ValueError, match="sum to 8"):
        CloAttention(16, 8, [4, 3])
    with pytest.raises(ValueError, match="stride 1"):
        CloBlock(16, 32)


def test_focal_modulation_refuses_an_even_window():
    with pytest.raises(ValueError, match="odd"):
        FocalModulation(16, focal_window=4)


def test_identity_start_is_exact_and_learns():
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    wrapped = IdentityStart(FocalModulation(8))
    assert torch.equal(wrapped(x), x)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (wrapped(x) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in wrapped.parameters())
    assert {key.split(".")[0] for key in wrapped.state_dict()} == {"m", "gamma"}


def test_drop_path_keeps_the_mean_and_whole_samples():
    drop = DropPath(0.25).train()
    torch.manual_seed(0)
    y = drop(torch.ones(4000, 1, 2, 2))
    assert abs(float(y.mean()) - 1) < 0.05
    assert torch.equal(y.amin((1, 2, 3)), y.amax((1, 2, 3)))
    assert torch.equal(drop.eval()(y), y)
