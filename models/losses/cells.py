"""The few cells and the one dense plane of a head's maps that a loss reads, each as a single differentiable operation.

The gradient of each is then one pass over the maps. Autograd alone needs five passes, each over a new tensor of the size of the
maps, which dominates the time of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.assigners.places import gather_places, scatter_add_places


def cells_and_background(
    maps: Sequence[Tensor], cell: Tensor, *, sides: int, gamma: float = 0.0, class_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Picks cells and sums the background loss p^γ · −log(1 − p) over all cells and classes, p the class scores.

    Args:
        maps: one (B, C, H, W) a level, float32; channels from ``sides`` on are class logits.
        cell: (B, R) int64, index of a cell over all levels, cells row by row.
        sides: channels before the class logits.
        gamma: exponent γ of the focal weight; 0 is the binary cross entropy.
        class_weights: (nc, 1) factor of each class's losses, without a gradient; None for none.

    Returns:
        (B, C, R) picked cells, and a scalar.
    """
    return _CellsAndBackground.apply(cell, sides, gamma, class_weights, *maps)  # type: ignore[no-any-return]


def places_and_plane(maps: Sequence[Tensor], place: Tensor, *, outputs: int, channel: int) -> tuple[Tensor, Tensor]:
    """Picks places of anchor-based maps, and one output of all places.

    Args:
        maps: one (B, anchors * outputs, H, W) a level.
        place: (B, R) int64, index over levels, anchors and cells, in this order.
        outputs: values a place.
        channel: the output to read at all places.

    Returns:
        (B, outputs, R) picked places, and (B, A).
    """
    return _PlacesAndPlane.apply(place, outputs, channel, *maps)  # type: ignore[no-any-return]


class _CellsAndBackground(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cell: Tensor, sides: int, gamma: float, class_weights: Tensor | None, *maps: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cell, *maps)
        ctx.sides, ctx.gamma = sides, gamma
        ctx.weights = None if class_weights is None else class_weights.unsqueeze(-1)  # (nc, 1, 1)
        total = maps[0].new_zeros(())
        for level in maps:
            logits = level[:, sides:]
            loss = F.softplus(logits)
            loss = loss if gamma == 0 else loss.mul_(logits.sigmoid().pow_(gamma))
            total += (loss if ctx.weights is None else loss.mul_(ctx.weights)).sum()
        return gather_places(maps, cell, maps[0].shape[1]), total

    @staticmethod
    def backward(ctx: Any, grad_cells: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        cell, *maps = ctx.saved_tensors
        sides, gamma = ctx.sides, ctx.gamma
        grads = []
        for level in maps:
            grad = torch.empty_like(level, memory_format=torch.contiguous_format)
            grad[:, :sides] = 0
            slope = grad[:, sides:]
            torch.sigmoid(level[:, sides:], out=slope)
            if gamma != 0:  # d/dx p^γ softplus(x) = p^γ (p + γ (1 - p) softplus(x)), p the sigmoid of x
                slope.copy_(slope.pow(gamma) * (slope + gamma * (1 - slope) * F.softplus(level[:, sides:])))
            if ctx.weights is not None:
                slope.mul_(ctx.weights)
            slope.mul_(grad_total)
            grads.append(grad)
        scatter_add_places(grads, cell, grad_cells)
        return None, None, None, None, *grads


class _PlacesAndPlane(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, place: Tensor, outputs: int, channel: int, *maps: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(place)
        ctx.outputs, ctx.channel, ctx.like = outputs, channel, [(m.shape, m.dtype, m.device) for m in maps]
        plane = torch.cat([m.unflatten(1, (-1, outputs))[:, :, channel].flatten(1) for m in maps], dim=1)
        return gather_places(maps, place, outputs), plane

    @staticmethod
    def backward(ctx: Any, grad_places: Tensor, grad_plane: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        grads = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        counts = [g[0].numel() // ctx.outputs for g in grads]
        for grad, plane in zip(grads, grad_plane.split(counts, dim=1)):
            view = grad.unflatten(1, (-1, ctx.outputs))[:, :, ctx.channel]
            view.copy_(plane.view_as(view))
        scatter_add_places(grads, place, grad_places)
        return None, None, None, *grads
