"""Attention to neighbours: gradients that are written out, checked against differences and against autograd, and their memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.layers.attention.ops import neighbourhood
from models.layers.attention.ops.neighbourhood import Neighbourhood, neighbourhood_attention

HEIGHT, WIDTH = 4, 3


def inputs(at: Neighbourhood, channels: int = 4) -> list[Tensor]:
    """Query, padded key, padded value."""
    margin = at.dilation * (at.kernel - 1)
    sides = [(at.stride * (n - 1) + 1 + margin) for n in (HEIGHT, WIDTH)]
    make = torch.Generator().manual_seed(0)
    sizes = [(HEIGHT, WIDTH), sides, sides]
    return [torch.randn(2, channels, *size, dtype=torch.float64, generator=make).requires_grad_() for size in sizes]


@pytest.mark.parametrize("at", [Neighbourhood(3, 2), Neighbourhood(3, 1, dilation=2, stride=2), Neighbourhood(5, 4, stride=3)])
def test_gradients_match_finite_differences_and_autograd(at, monkeypatch):
    given = inputs(at)
    assert torch.autograd.gradcheck(lambda q, k, v: neighbourhood_attention(q, k, v, at, scale=0.5), given, fast_mode=True)
    lean = neighbourhood_attention(*given, at, scale=0.5)
    grads = torch.autograd.grad(lean.square().sum(), given)
    monkeypatch.setattr(neighbourhood, "recorded", lambda: True)
    plain = neighbourhood_attention(*given, at, scale=0.5)
    torch.testing.assert_close(lean, plain)
    torch.testing.assert_close(grads, torch.autograd.grad(plain.square().sum(), given))


class MapsMade(TorchDispatchMode):
    """Counts new tensors as large as a map."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.storages = size, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= value.element_size() * self.size:
                self.storages.add(value.untyped_storage())  # held, so that no address comes twice
        return result


def test_no_map_is_allocated_per_neighbour():
    at = Neighbourhood(7, 2)
    given = inputs(at, channels=256)
    with MapsMade(given[0].numel()) as made:
        neighbourhood_attention(*given, at, scale=0.5).square().sum().backward()
    assert len(made.storages) <= at.kernel**2 / 3
