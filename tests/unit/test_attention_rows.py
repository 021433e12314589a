"""Attention by blocks of rows: what fused attention gives, gradients included, and no matrix of all pairs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.attention import rows
from models.layers.attention.common import fused_attention


def inputs(keys: int = 7, width: int = 5, value_width: int = 3) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(0)
    sizes = [(2, 2, 9, width), (2, 2, keys, width), (2, 2, keys, value_width)]
    return tuple(torch.randn(size, dtype=torch.float64, generator=make).requires_grad_() for size in sizes)


@pytest.fixture(params=[1, 4, 100])
def height(request, monkeypatch) -> int:
    """Rows of a block, of nine."""
    monkeypatch.setattr(rows, "FEWEST_PAIRS", 1)
    monkeypatch.setattr(rows, "SHARE_OF_ROWS", 1)
    monkeypatch.setattr(rows, "BLOCK_FLOATS", 2 * 9 * request.param)
    return request.param


@pytest.mark.parametrize(("width", "value_width", "scale"), [(5, 3, 1.0), (2, 4, 0.3)])
def test_rows_agree_with_fused_attention(height, width, value_width, scale):
    given = inputs(width=width, value_width=value_width)
    out = fused_attention(*given, scale=scale)
    expected = F.scaled_dot_product_attention(*given, scale=scale)
    assert "ByRows" in type(out.grad_fn.next_functions[0][0]).__name__
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), given), torch.autograd.grad((expected * weight).sum(), given))


def test_a_key_that_is_the_query(height):
    query, _, value = inputs(keys=9)
    out = fused_attention(query, query, value, scale=1.0)
    expected = F.scaled_dot_product_attention(query, query, value, scale=1.0)
    assert "OfItself" in type(out.grad_fn.next_functions[0][0]).__name__
    torch.testing.assert_close(out, expected)
    weight, given = torch.randn_like(out), (query, value)
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), given), torch.autograd.grad((expected * weight).sum(), given))


@pytest.mark.parametrize("same", [True, False])
def test_large_logits_stay_finite(height, same):
    query, _, value = (100 * part.detach().float() for part in inputs(keys=9))
    query.requires_grad_()
    out = fused_attention(query, query if same else query.clone(), value, scale=1.0)
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert torch.isfinite(out).all()
    assert torch.isfinite(grad).all()
