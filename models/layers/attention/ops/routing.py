"""What both forms of bi-level routing attention share: attention to chosen windows only, and the projections that choose them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import fused_attention, take_rows


def routed_attention(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, *, heads: int, scale: float, weights: Tensor | None = None
) -> Tensor:
    """Attention of each window's pixels to the pixels of the windows that ``index`` names, all of them in one softmax.

    Args:
        query: (B, P, T, Q), P windows of T pixels.
        key: (B, P, S, Q).
        value: (B, P, S, V).
        index: (B, P, K) windows in 0 … P - 1.
        heads: number of heads, contiguous groups of channels.
        scale: factor of the logits.
        weights: (B, P, K) factors of the gathered keys and values.

    Returns:
        (B, P, T, V).
    """
    batch, windows, pixels, _ = query.shape
    gathered = (_gather_windows(part, index, weights) for part in (key, value))  # (B P, K S, Q) and (B P, K S, V)
    q, k, v = (x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2) for x in (query.flatten(0, 1), *gathered))
    out = fused_attention(q, k, v, scale=scale)  # (B P, heads, T, V / heads)
    return out.transpose(1, 2).reshape(batch, windows, pixels, value.shape[-1])


def _gather_windows(part: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """The windows that each window chose, side by side: (B, P, S, C), (B, P, K) -> (B P, K S, C)."""
    rows = take_rows(part.flatten(2), index.flatten(1))  # (B, P K, S C)
    if weights is not None:
        rows = rows * weights.flatten(1).unsqueeze(-1).to(rows.dtype)
    return rows.reshape(index.shape[0] * index.shape[1], -1, part.shape[-1])


def adaptive_mean(x: Tensor, size: int, bins: int) -> Tensor:
    """Adaptive average pooling along the last dimension but one, as a product with a small matrix.

    The library's own kernel adds atomically in its backward pass and cannot be exported for sizes that are not known.

    Returns:
        (..., n, D) -> (..., bins, D), n = ``size``; bin i is the mean of the entries in [floor(i n / bins), ceil((i + 1) n / bins)).
    """
    inside = _inside_bins(x, size, bins).to(x.dtype)
    return (inside / inside.sum(1, keepdim=True)) @ x


def adaptive_max(x: Tensor, size: int, bins: int) -> Tensor:
    """Adaptive max pooling along the last dimension but one; bins as in :func:`adaptive_mean`; equal maxima share a gradient.

    Returns:
        (..., n, D) -> (..., bins, D).
    """
    outside = ~_inside_bins(x, size, bins)
    return torch.cat([x.masked_fill(outside[i].unsqueeze(-1), -torch.inf).amax(-2, keepdim=True) for i in range(bins)], -2)


def _inside_bins(like: Tensor, size: int, bins: int) -> Tensor:
    """Which of ``size`` entries are in which bin of adaptive pooling: (bins, n) bool."""
    place, bin_index = torch.arange(size, device=like.device), torch.arange(bins, device=like.device).unsqueeze(1)
    first = (bin_index * size).div(bins, rounding_mode="floor")
    end = ((bin_index + 1) * size + bins - 1).div(bins, rounding_mode="floor")
    return (place >= first) & (place < end)


def project_in_float32(means: Tensor, layer: nn.Linear | nn.Conv2d, rows: int) -> Tensor:
    """The first ``rows`` outputs of a pointwise layer, in float32: (..., C) -> (..., rows)."""
    bias = None if layer.bias is None else layer.bias[:rows].float()
    return F.linear(means, layer.weight[:rows].flatten(1).float(), bias)


def at_least_one(size: int) -> int:
    """max(size, 1), in a form that a traced graph keeps for other sizes."""
    return size.clamp(min=1) if isinstance(size, Tensor) else max(size, 1)


def check_heads(heads: int, *widths: int) -> None:
    """Raises ValueError where the heads do not divide each of the widths."""
    for width in widths:
        if width % heads:
            raise ValueError(f"{heads} heads do not divide {width} channels")
