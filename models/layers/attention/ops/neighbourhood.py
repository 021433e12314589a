"""Attention to the neighbours of each pixel without unfolding them: every neighbour is a shifted view of one padded map.

With plain autograd each view's gradient would be a separate map, all in memory at once: the unfolded copy again, in the backward
pass. So the two sums over neighbours have explicit gradients, which accumulate into one padded map, view by view.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.attention.ops.common import recorded, weighted_sum


class Neighbourhood(NamedTuple):
    """Which pixels of a padded map each pixel attends to, and how channels form heads (contiguous groups)."""

    kernel: int
    heads: int
    dilation: int = 1
    stride: int = 1

    def views(self, padded: Tensor) -> list[Tensor]:
        """The kernel² shifted views, row-major: (B, heads * d, H + margin, W + margin) -> each (B, heads, d, H / stride, W / stride)."""
        margin = self.dilation * (self.kernel - 1)
        height, width = padded.shape[-2] - margin, padded.shape[-1] - margin
        split = self.split(padded)
        offsets = [self.dilation * i for i in range(self.kernel)]
        return [split[..., y : y + height : self.stride, x : x + width : self.stride] for y in offsets for x in offsets]

    def split(self, x: Tensor) -> Tensor:
        """(B, heads * d, H, W) -> (B, heads, d, H, W)."""
        return x.unflatten(1, (self.heads, x.shape[1] // self.heads))


def neighbourhood_attention(query: Tensor, key: Tensor, value: Tensor, at: Neighbourhood, *, scale: float, dropout: float = 0.0) -> Tensor:
    """Softmax attention of each pixel over its neighbours; the softmax is in float32.

    Args:
        query: (B, heads * d, H, W).
        key: padded by dilation (kernel // 2) on all sides; before, H and W were ``stride`` times the query's, or up to stride - 1 less.
        value: like the key.
        at: the neighbourhood.
        scale: factor of the logits.
        dropout: probability with which a weight is dropped.

    Returns:
        (B, heads * d, H, W).
    """
    query = query * scale
    logits = _products(query, key, at) if recorded() else _Products.apply(query.contiguous(), key.contiguous(), at)
    weights = F.dropout(logits.softmax(0), dropout) if dropout else logits.softmax(0)
    return neighbourhood_sum(weights.to(value.dtype), value, at)


def neighbourhood_sum(weights: Tensor, value: Tensor, at: Neighbourhood) -> Tensor:
    """Σ over the neighbours of weight · value: (neighbours, B, heads, H, W) and a padded map -> (B, heads * d, H, W)."""
    return _sum(weights, value, at) if recorded() else _Sum.apply(weights.contiguous(), value.contiguous(), at)


def _products(query: Tensor, padded: Tensor, at: Neighbourhood) -> Tensor:
    """q · k of each head and neighbour: (B, heads * d, H, W) and a padded map -> (neighbours, B, heads, H, W), at least float32."""
    split, wide = at.split(query), torch.promote_types(query.dtype, torch.float32)
    return torch.stack([(split * view).sum(2, dtype=wide) for view in at.views(padded)])


def _sum(weights: Tensor, padded: Tensor, at: Neighbourhood) -> Tensor:
    views = at.views(padded)
    return weighted_sum(views, [weight.unsqueeze(2) for weight in weights.unbind(0)]).flatten(1, 2)


class _Products(torch.autograd.Function):
    """_products with one product in memory at a time."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, padded: Tensor, at: Neighbourhood) -> Tensor:
        ctx.save_for_backward(query, padded)
        ctx.at = at
        return _products_in_place(query, padded, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, padded = ctx.saved_tensors
        grad = grad.to(query.dtype)
        of_query = _sum_in_place(grad, padded, ctx.at) if ctx.needs_input_grad[0] else None
        return of_query, _spread(grad, query, padded, ctx.at) if ctx.needs_input_grad[1] else None, None


class _Sum(torch.autograd.Function):
    """_sum whose gradients are added up in place."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, padded: Tensor, at: Neighbourhood) -> Tensor:
        ctx.save_for_backward(weights, padded)
        ctx.at = at
        return _sum_in_place(weights, padded, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, padded = ctx.saved_tensors
        grad = grad.contiguous()
        of_weights = _products_in_place(grad, padded, ctx.at).to(weights.dtype) if ctx.needs_input_grad[0] else None
        return of_weights, _spread(weights, grad, padded, ctx.at) if ctx.needs_input_grad[1] else None, None


def _products_in_place(query: Tensor, padded: Tensor, at: Neighbourhood) -> Tensor:
    split, views = at.split(query), at.views(padded)
    logits = split.new_zeros(len(views), *split.shape[:2], *split.shape[3:], dtype=torch.promote_types(query.dtype, torch.float32))
    product = torch.zeros_like(split)
    for view, logit in zip(views, logits):
        torch.mul(split, view, out=product)
        torch.sum(product, 2, dtype=logits.dtype, out=logit)
    return logits


def _sum_in_place(weights: Tensor, padded: Tensor, at: Neighbourhood) -> Tensor:
    views = at.views(padded)
    total = views[0] * weights[0].unsqueeze(2)
    for view, weight in zip(views[1:], weights[1:]):
        total.addcmul_(view, weight.unsqueeze(2))
    return total.flatten(1, 2)


def _spread(weights: Tensor, x: Tensor, padded: Tensor, at: Neighbourhood) -> Tensor:
    """The transpose of _sum: every pixel adds weight · x to its neighbours' places in a padded map of zeros."""
    total = torch.zeros_like(padded)
    split = at.split(x)
    for view, weight in zip(at.views(total), weights):
        view.addcmul_(split, weight.unsqueeze(2))
    return total
