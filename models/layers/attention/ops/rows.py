"""Softmax attention whose value is narrower or wider than query and key, some rows of the matrix of weights at a time.

torch's fused attention needs one width: the narrower side would be padded with zeros, which costs multiplications. On a CPU, blocks of rows
as matrix products, computed again for the backward pass, take no more memory and less time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_FLOATS = 2 << 20  # of the two blocks of rows that exist at a time
FEWEST_BLOCKS = 12  # blocks of rows, at least, where only those above the diagonal are computed
NEGLIGIBLE_LOGIT = -50.0  # of a weight that vanishes in any sum; exponentials of smaller numbers are slow
FEWEST_PAIRS = 1 << 18  # of positions, below which a loop costs more than it saves
LEAST_WIDTH = 128  # of the wider side; below it exponentials take most of the time, and padding costs little


def better_by_rows(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether attention_by_rows is the better form: on a CPU, in full precision, for large maps and unequal, large widths."""
    narrow, wide = sorted((query.shape[-1], value.shape[-1]))
    if not query.is_cpu or torch.is_autocast_enabled("cpu") or narrow == wide or wide < LEAST_WIDTH:
        return False
    full = query.dtype == key.dtype == value.dtype and query.dtype in (torch.float32, torch.float64)
    return full and query.shape[-2] * key.shape[-2] >= FEWEST_PAIRS


def attention_by_rows(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v: (B, heads, N, d), (B, heads, M, d), (B, heads, M, v) -> (B, heads, N, v).

    A key that is the query itself, without a scale, halves the products of the backward pass.
    """
    batch = query.shape[:2]
    if key is query and scale == 1.0:
        return _OfItself.apply(query.flatten(0, 1), value.flatten(0, 1)).unflatten(0, batch)
    query = query if scale == 1.0 else query * scale
    return _ByRows.apply(*(part.flatten(0, 1) for part in (query, key, value))).unflatten(0, batch)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = value.new_zeros(*query.shape[:2], value.shape[2])
        for index, rows, weights, _ in _blocks(query, key):
            torch.mm(weights, value[index], out=out[index, rows])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(ctx, grad, lambda q, k, v: (q @ k.transpose(1, 2)).softmax(2) @ v)
        of_query, of_key, of_value = _needed_gradients(ctx, query, key, value)
        mean = (grad * out).sum(2, keepdim=True)  # (B, N, 1): each row's gradients, weighted
        for index, rows, weights, spare in _blocks(query, key):
            g = grad[index, rows]
            if of_value is not None:
                of_value[index].addmm_(weights.t(), g)
            if of_query is None and of_key is None:
                continue
            logits = torch.mm(g, value[index].t(), out=spare).sub_(mean[index, rows]).mul_(weights)
            if of_query is not None:
                torch.mm(logits, key[index], out=of_query[index, rows])
            if of_key is not None:
                of_key[index].addmm_(logits.t(), query[index, rows])
        return of_query, of_key, of_value


class _OfItself(torch.autograd.Function):
    """_ByRows where query and key are one: the logits are symmetric.

    The block of rows I and columns J holds the logits of J and I as well, so only blocks on and above the diagonal are computed. With
    their gradients G_IJ + G_JIᵀ = G, x_I gets G x_J and x_J gets Gᵀ x_I.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        out, norm = value.new_zeros(value.shape), x.new_zeros(x.shape[:2])
        for index, rows, weights, logits in _blocks(x, x):
            torch.mm(weights, value[index], out=out[index, rows])
            if any(ctx.needs_input_grad):  # the logarithm of what the exponentials were divided by
                norm[index, rows] = logits.amax(1) - weights.amax(1).log()
        ctx.save_for_backward(x, value, out, norm)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, value, out, norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(ctx, grad, lambda x, v: (x @ x.transpose(1, 2)).softmax(2) @ v)
        grad = grad.contiguous()
        of_x, of_value = _needed_gradients(ctx, x, value)
        mean = (grad * out).sum(2)  # (B, N)
        for index in range(x.shape[0]):
            into = (None if part is None else part[index] for part in (of_x, of_value))
            _add_gradients(x[index], value[index], grad[index], norm[index], mean[index], *into)
        return of_x, of_value


def _add_gradients(
    x: Tensor, value: Tensor, grad: Tensor, norm: Tensor, mean: Tensor, of_x: Tensor | None, of_value: Tensor | None
) -> None:
    """_OfItself's for one entry of the batch, into ``of_x`` and ``of_value``; all (N, …)."""
    count = x.shape[0]
    most = max(1, min(count // FEWEST_BLOCKS, BLOCK_FLOATS // (2 * count)))
    memory = x.new_zeros(3, most * count)
    for start in range(0, count, most):
        end = min(start + most, count)
        high, size = end - start, count - start
        all_logits, weights, gradient = (part[: high * size].view(high, size) for part in memory)
        torch.mm(x[start:end], x[start:].t(), out=all_logits)
        torch.sub(all_logits, norm[start:end, None], out=weights).clamp_(min=NEGLIGIBLE_LOGIT).exp_()  # of rows I for J
        if of_value is not None:
            of_value[start:].addmm_(weights.t(), grad[start:end])
        if of_x is not None:
            torch.mm(grad[start:end], value[start:].t(), out=gradient).sub_(mean[start:end, None]).mul_(weights)
        if end < count:
            logits, weights = (part[: high * (count - end)].view(high, -1) for part in memory[:2])
            torch.sub(all_logits[:, high:], norm[end:], out=weights).clamp_(min=NEGLIGIBLE_LOGIT).exp_()  # of rows J for I
            if of_value is not None:
                of_value[start:end].addmm_(weights, grad[end:])
            if of_x is not None:
                gradient[:, high:] += torch.mm(value[start:end], grad[end:].t(), out=logits).sub_(mean[end:]).mul_(weights)
        if of_x is not None:
            of_x[start:end].addmm_(gradient, x[start:])
            of_x[start:].addmm_(gradient.t(), x[start:end])


def _needed_gradients(ctx: Any, *given: Tensor) -> list[Tensor | None]:
    """Zeros for the gradients that autograd needs, None for the others."""
    return [torch.zeros_like(x, memory_format=torch.contiguous_format) if need else None for x, need in zip(given, ctx.needs_input_grad)]


def _differentiable(ctx: Any, grad: Tensor, plain: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients where they may be differentiated themselves: torch's own, with a graph, of the formula written out.

    ``once_differentiable`` would not be enough: torch.autograd.grad then silently omits the gradient of the loops.
    """
    needs = ctx.needs_input_grad
    own = ctx.saved_tensors[: len(needs)]  # views made for this call: none is reached by way of what made another
    found = iter(torch.autograd.grad(plain(*own), [x for x, need in zip(own, needs) if need], grad, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Entry of the batch, rows, their weights (rows, M), and their logits, to write over; the memory of both serves the next block."""
    count, keys = query.shape[1], key.shape[1]
    most = min(count, max(1, BLOCK_FLOATS // (2 * keys)))
    memory = query.new_zeros(2, most, keys)
    for index in range(query.shape[0]):
        for start in range(0, count, most):
            rows = slice(start, min(start + most, count))
            logits, weights = memory[:, : rows.stop - start]
            torch.mm(query[index, rows], key[index].t(), out=logits)
            yield index, rows, torch.softmax(logits, 1, out=weights), logits
