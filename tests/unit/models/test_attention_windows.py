"""Attention in windows: a few windows at a time gives what all at once give, gradients included, and keeps no logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.layers.attention.ops import windows
from models.layers.attention.ops.windows import Tiling, window_attention
from models.layers.attention.swin import SwinWindowAttention

HEADS, CHANNELS = 2, 4
TILINGS = [Tiling(2, 3, HEADS), Tiling(4, 1, HEADS), Tiling(1, 6, HEADS), Tiling(2, 3, HEADS, spread=True)]


def inputs(tiling: Tiling) -> list[Tensor]:
    """Query, key, value (twice as wide) of a 4 x 6 map, and a bias."""
    make = torch.Generator().manual_seed(0)
    pixels = tiling.height * tiling.width
    sizes = [(2, CHANNELS, 4, 6), (2, CHANNELS, 4, 6), (2, 2 * CHANNELS, 4, 6), (HEADS, pixels, pixels)]
    return [torch.randn(size, dtype=torch.float64, generator=make).requires_grad_() for size in sizes]


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("fit", [1, 3, 100])
def test_chunked_windows_equal_all_windows_at_once(tiling, fit, monkeypatch):
    *maps, bias = given = inputs(tiling)
    regions = (torch.arange(6) > 3).long().expand(1, 1, 4, 6)
    out = []
    for limit in (fit * windows._floats(maps[0], maps[2], tiling), 0):
        monkeypatch.setattr(windows, "CHUNK_FLOATS", limit)
        y = window_attention(*maps, tiling, scale=0.7, bias=bias, regions=regions)
        assert ("InChunks" in type(y.grad_fn).__name__) == (limit > 0)
        out.append((y, *torch.autograd.grad(y.square().sum(), given)))
    torch.testing.assert_close(*out)


@pytest.mark.parametrize("tiling", TILINGS[::3])
def test_gradients_match_finite_differences(tiling):
    def attended(*given: Tensor) -> Tensor:
        return window_attention(*given[:3], tiling, scale=0.7, bias=given[3])

    assert torch.autograd.gradcheck(attended, inputs(tiling), fast_mode=True)


def test_autograd_saves_maps_but_no_logits():
    block, x, kept = SwinWindowAttention(16, 4, 8), torch.zeros(1, 16, 32, 32), {}
    free = {p.untyped_storage().data_ptr() for p in block.parameters()} | {x.untyped_storage().data_ptr()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in free:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = block(x)
    assert held is not None
    assert sum(kept.values()) < 5.5 * x.numel() * x.element_size() + 8 * 32 * 32 * 4  # input, query, key, value, result; regions, bias
