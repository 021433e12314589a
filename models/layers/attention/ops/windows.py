"""Softmax attention inside the rectangles that tile a map: windows, rows, columns, or pixels that lie a stride apart.

Cutting a map into windows copies it, and autograd keeps the copies and the logits. On a CPU, where windows are small, a few of them at a
time are copied, attended and written back, which fits the cache; the backward pass does the same again. On a GPU, and for
exporters and compilers, which need plain operators, it is one fused attention over all windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import recorded

CHUNK_FLOATS = 1 << 19  # floats of a chunk of windows with its logits, sized for a core's cache
MASKED = -100.0  # added to the logits between pixels of two regions


class Tiling(NamedTuple):
    """How pixels form windows; sides of the map are multiples of ``height`` and ``width``.

    ``spread``: the pixels of a window do not touch, but are equally far apart over the whole map.
    """

    height: int
    width: int
    heads: int
    spread: bool = False

    def windows(self, x: Tensor) -> Tensor:
        """A view of a map: (B, heads * d, H, W) -> (B, rows, columns, heads, height, width, d), rows x columns windows."""
        split = x.unflatten(1, (self.heads, x.shape[1] // self.heads))
        if self.spread:
            return split.unflatten(4, (self.width, -1)).unflatten(3, (self.height, -1)).permute(0, 4, 6, 1, 3, 5, 2)
        return split.unflatten(4, (-1, self.width)).unflatten(3, (-1, self.height)).permute(0, 3, 5, 1, 4, 6, 2)


def channels_last(x: Tensor) -> Tensor:
    """The map with a pixel's channels side by side in memory, so that windows are copied in long runs."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def project(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """A linear layer or 1x1 convolution over the channels of a map, channels last: (B, C, H, W) -> (B, out, H, W)."""
    return F.linear(x.permute(0, 2, 3, 1).contiguous(), layer.weight.flatten(1), layer.bias).permute(0, 3, 1, 2)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiling: Tiling,
    *,
    scale: float,
    bias: Tensor | None = None,
    regions: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v inside each window.

    Args:
        query: (B, heads * d, H, W).
        key: (B, heads * d, H, W).
        value: (B, heads * v, H, W).
        tiling: how pixels form windows.
        scale: factor of the logits.
        bias: (heads, N, N) for the N pixels of a window.
        regions: (1, 1, H, W) numbers; between pixels with different ones MASKED is added to the logits.
        dropout: probability with which a weight is dropped.

    Returns:
        (B, heads * v, H, W).
    """
    if dropout == 0.0 and query.is_cpu and not recorded() and _floats(query, value, tiling) <= CHUNK_FLOATS:
        return _InChunks.apply(query, key, value, bias, regions, tiling, scale)
    return _at_once((query, key, value), tiling, scale, bias, regions, dropout)


def _at_once(
    maps: tuple[Tensor, Tensor, Tensor], tiling: Tiling, scale: float, bias: Tensor | None, regions: Tensor | None, dropout: float
) -> Tensor:
    q, k, v = (tiling.windows(part).flatten(4, 5).flatten(1, 3).contiguous() for part in maps)  # (B, windows heads, N, d)
    mask = None
    if regions is not None or bias is not None:
        apart = q.new_zeros(1, 1, 1, 1) if regions is None else _apart(_single(tiling).windows(regions)[0].flatten(2).flatten(0, 1))
        mask = (apart + (0 if bias is None else bias)).to(q.dtype).flatten(0, 1).unsqueeze(0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    batch, channels, height, width = maps[2].shape
    rows, columns = height // tiling.height, width // tiling.width
    grid = out.reshape(batch, rows, columns, tiling.heads, tiling.height, tiling.width, channels // tiling.heads)
    order = (0, 3, 6, 4, 1, 5, 2) if tiling.spread else (0, 3, 6, 1, 4, 2, 5)
    return grid.permute(order).reshape(batch, channels, height, width)


class _InChunks(torch.autograd.Function):
    """Keeps query, key and value as maps; weights are computed again for the backward pass, a chunk of windows at a time."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        query, key, value, bias, regions, tiling, scale = given
        ctx.save_for_backward(query, key, value, bias, regions)
        ctx.tiling, ctx.scale = tiling, scale
        out = torch.zeros_like(value)
        into = tiling.windows(out)
        for chunk, q, k, v, apart in _chunks(query, key, value, regions, tiling):
            _put(into[chunk], _weights(q, k, scale, bias, apart) @ v)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, regions = ctx.saved_tensors
        maps = [torch.empty_like(part) for part in (query, key, value)]
        into = [ctx.tiling.windows(part) for part in maps]
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))
        outer = ctx.tiling.windows(grad)
        for chunk, q, k, v, apart in _chunks(query, key, value, regions, ctx.tiling):
            weights, g = _weights(q, k, ctx.scale, bias, apart), _pixels(outer[chunk])
            _put(into[2][chunk], weights.transpose(2, 3) @ g)
            logits = (g @ v.transpose(2, 3)).mul_(weights)
            logits.addcmul_(weights, logits.sum(3, keepdim=True), value=-1)
            if of_bias is not None:
                of_bias += logits.sum(0)
            logits *= ctx.scale
            _put(into[0][chunk], logits @ k)
            _put(into[1][chunk], logits.transpose(2, 3) @ q)
        return (*maps, None if of_bias is None else of_bias.to(bias.dtype), None, None, None)


def _chunks(query: Tensor, key: Tensor, value: Tensor, regions: Tensor | None, tiling: Tiling) -> Iterator[tuple[Any, ...]]:
    """Slices of some windows each, with their query, key and value (windows, heads, N, d) and the mask between their regions."""
    views = [tiling.windows(part) for part in (query, key, value)]
    batch, rows, columns = views[0].shape[:3]
    fit = max(1, CHUNK_FLOATS // _floats(query, value, tiling))
    across = min(columns, fit)
    down = min(rows, max(1, fit // columns))
    numbers = None if regions is None else _single(tiling).windows(regions)[0].flatten(2)  # (rows, columns, N)
    mixed = None if numbers is None else numbers.amin(2) != numbers.amax(2)
    for image in range(batch):
        for y in range(0, rows, down):
            for x in range(0, columns, across):
                place = (slice(y, y + down), slice(x, x + across))
                apart = None
                if numbers is not None and mixed is not None and mixed[place].any():
                    apart = _apart(numbers[place].flatten(0, 1))
                yield (image, *place), *(_pixels(view[image][place]) for view in views), apart


def _weights(query: Tensor, key: Tensor, scale: float, bias: Tensor | None, apart: Tensor | None) -> Tensor:
    logits = (query * scale) @ key.transpose(2, 3)
    for term in (bias, apart):
        if term is not None:
            logits += term
    return logits.softmax(3, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query.dtype)


def _pixels(windows: Tensor) -> Tensor:
    """(rows, columns, heads, height, width, d) -> (windows, heads, N, d), a copy."""
    return windows.flatten(3, 4).flatten(0, 1)


def _put(windows: Tensor, pixels: Tensor) -> None:
    """The inverse of _pixels, into a view of a map."""
    windows.copy_(pixels.view(windows.shape))


def _single(tiling: Tiling) -> Tiling:
    return Tiling(tiling.height, tiling.width, 1, tiling.spread)


def _apart(numbers: Tensor) -> Tensor:
    """(windows, N) numbers of regions -> (windows, 1, N, N): 0 within a region, MASKED between two."""
    return (numbers[:, None, :, None] != numbers[:, None, None, :]) * MASKED


def _floats(query: Tensor, value: Tensor, tiling: Tiling) -> int:
    """Numbers that one window needs: query, key, value, result, and the logits twice."""
    pixels = tiling.height * tiling.width
    return pixels * (2 * query.shape[1] + 2 * value.shape[1] + 2 * tiling.heads * pixels)
