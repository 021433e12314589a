"""Attention by blocks of rows: the formula, its first and second gradients, and no matrix of all pairs; elsewhere torch's fused form."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from models.layers.attention.danet import DANet
from models.layers.attention.nonlocal_block import NLBlockND
from models.layers.attention.ops import rows
from models.layers.attention.ops.common import fused_attention
from tests.golden import assert_close, fill_


def inputs(keys: int = 7, width: int = 5, value_width: int = 3) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(0)
    sizes = [(2, 2, 9, width), (2, 2, keys, width), (2, 2, keys, value_width)]
    return tuple(torch.randn(size, dtype=torch.float64, generator=make).requires_grad_() for size in sizes)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(2, 3)).softmax(3) @ value


def attended(*given: Tensor) -> Tensor:
    """Of query, key and value, or of a query that is the key and a value."""
    return fused_attention(given[0], given[-2], given[-1], scale=1.0)


def function_of(out: Tensor) -> str:
    """The name of what made an output, under the view that splits batch and heads."""
    return type(out.grad_fn.next_functions[0][0]).__name__


@pytest.fixture(params=[1, 4, 100])
def height(request, monkeypatch) -> int:
    """Rows of a block, of nine."""
    monkeypatch.setattr("models.layers.attention.ops.common.better_by_rows", lambda *_: True)
    monkeypatch.setattr(rows, "FEWEST_BLOCKS", 1)
    monkeypatch.setattr(rows, "BLOCK_FLOATS", 2 * 9 * request.param)
    return request.param


@pytest.mark.parametrize(("width", "value_width", "scale"), [(5, 3, 1.0), (2, 4, 0.3)])
def test_rows_agree_with_fused_attention(height, width, value_width, scale):
    given = inputs(width=width, value_width=value_width)
    out = fused_attention(*given, scale=scale)
    expected = F.scaled_dot_product_attention(*given, scale=scale)
    assert "ByRows" in function_of(out)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), given), torch.autograd.grad((expected * weight).sum(), given))


def test_key_may_be_the_query(height):
    query, _, value = inputs(keys=9)
    out = fused_attention(query, query, value, scale=1.0)
    expected = F.scaled_dot_product_attention(query, query, value, scale=1.0)
    assert "OfItself" in function_of(out)
    torch.testing.assert_close(out, expected)
    weight, given = torch.randn_like(out), (query, value)
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), given), torch.autograd.grad((expected * weight).sum(), given))


@pytest.mark.parametrize("same", [True, False])
def test_second_order_gradients_match_finite_differences(height, same):
    query, key, value = inputs(keys=9)
    given = (query, value) if same else (query, key, value)
    assert torch.autograd.gradgradcheck(attended, given, fast_mode=True)


@pytest.mark.parametrize("same", [True, False])
def test_double_backward_through_the_value_is_correct(height, same):
    """A value computed from the query, as in a network, through two derivatives."""
    query, key, _ = (part.detach() for part in inputs(keys=9))

    def twice(attend) -> Tensor:
        x = query.clone().requires_grad_()
        out = attend(x, x if same else key, x[..., :3].sin())
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(twice(attended), twice(plain))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("again", [True, False])
def test_frozen_inputs_get_no_gradient(height, wanted, again):
    given = [part.detach().requires_grad_(index in wanted) for index, part in enumerate(inputs(keys=9))]
    for parts in (given, given[::2]):
        taken = [part for part in parts if part.requires_grad]
        if not taken:
            continue
        out, found = attended(*parts), []
        out.grad_fn.next_functions[0][0].register_hook(lambda got, _, found=found: found.extend(got))
        grads = torch.autograd.grad(out.sum(), taken, create_graph=again)
        torch.testing.assert_close(grads, torch.autograd.grad(plain(parts[0], parts[-2], parts[-1]).sum(), taken))
        assert [part is not None for part in found] == [part.requires_grad for part in parts]


@pytest.mark.parametrize("same", [True, False])
def test_large_logits_stay_finite(height, same):
    query, _, value = (100 * part.detach().float() for part in inputs(keys=9))
    query.requires_grad_()
    out = fused_attention(query, query if same else query.clone(), value, scale=1.0)
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert torch.isfinite(out).all()
    assert torch.isfinite(grad).all()


class Largest(TorchDispatchMode):
    """Remembers the size of the largest storage that any operator gave."""

    floats = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.floats = max(self.floats, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.fixture
def networks(monkeypatch) -> list[torch.nn.Module]:
    """Blocks that come here with maps of 24 x 22, the one with a key that is the query."""
    monkeypatch.setattr(rows, "LEAST_WIDTH", 8)
    return [fill_(NLBlockND(8, mode="gaussian")).eval(), fill_(DANet(8)).eval()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_full_attention_matrix_is_never_allocated(networks, layout, monkeypatch):
    pairs = (24 * 22) ** 2
    monkeypatch.setattr(rows, "BLOCK_FLOATS", pairs // 8)
    for block in networks:
        x = torch.randn(1, 8, 24, 22).contiguous(memory_format=layout).requires_grad_()
        with Largest() as seen:
            block(x).square().sum().backward()
        assert seen.floats < pairs / 4


def test_only_large_maps_use_the_row_kernel():
    query, key, value = (torch.zeros(1, 1, 520, width, requires_grad=True) for width in (96, 96, 128))
    assert "ByRows" in function_of(fused_attention(query, key, value, scale=1.0))
    half = [part.bfloat16() for part in (query, key, value)]
    small = [part[:, :, :500] for part in (query, key, value)]
    narrow = [query, key, value[..., :64]]
    for given, dropout in (((query, key, key), 0.0), (half, 0.0), ((query, key, value), 0.1), (small, 0.0), (narrow, 0.0)):
        assert "Rows" not in function_of(fused_attention(*given, scale=1.0, dropout=dropout))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_attention(query, key, value, scale=1.0).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_are_supported(networks):
    """torch.func wants torch's own operators."""
    for block in networks:
        x = torch.randn(2, 8, 24, 22)

        def loss(x: Tensor, block: torch.nn.Module = block) -> Tensor:
            return block(x[None]).square().sum()

        each = torch.func.vmap(torch.func.grad(loss))(x)
        given = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(block(given).square().sum(), given)
        assert_close(each, expected, 1e-4)


def test_activation_checkpointing_and_copies_give_equal_gradients(networks):
    for block in networks:
        grads = []
        again = [partial(checkpoint, block, use_reentrant=kind) for kind in (True, False)]
        for run in (block, copy.deepcopy(block), *again):
            x = torch.randn(1, 8, 24, 22, generator=torch.Generator().manual_seed(0)).requires_grad_()
            run(x).square().sum().backward()
            grads.append(x.grad)
        assert all(torch.equal(grad, grads[0]) for grad in grads[1:])
