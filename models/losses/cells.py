"""The few cells and the one dense plane of a head's maps that a loss reads, each as a single differentiable operation.

The gradient of each is then one pass over the maps. Autograd alone needs five passes, each over a new tensor of the size of the
maps, which dominates the time of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.assigners.places import gather_places, scatter_add_places


class Tables(NamedTuple):
    """Maps (B, C, H, W) of K branches as tables of cells in :class:`models.assigners.grid.RowOrder`, without a gradient.

    In float32 where the maps are in half precision.
    """

    sides: Tensor  # (T, S), the first channels
    logits: Tensor  # (T, nc), the class logits


def as_tables(branches: Sequence[Sequence[Tensor]], *, sides: int) -> Tables:
    """Reads each map once; ``sides`` is S."""
    rows = [level.detach().permute(0, 2, 3, 1) for maps in branches for level in maps]  # (B, H, W, C)
    dtype = torch.promote_types(rows[0].dtype, torch.float32)
    return Tables(*(torch.cat([r[..., part].flatten(0, 2) for r in rows]).to(dtype) for part in (slice(sides), slice(sides, None))))


def cells_and_background(
    branches: Sequence[Sequence[Tensor]], tables: Tables, row: Tensor, *, gamma: float = 0.0, class_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Picks cells and sums the background loss p^γ · −log(1 − p) over all cells and classes, p the class scores.

    Args:
        branches: the maps of K branches.
        tables: of the same maps.
        row: (R,) int64, rows of the tables.
        gamma: exponent γ of the focal weight; 0 is the binary cross entropy.
        class_weights: (nc,) factor of each class's losses, without a gradient; None for none.

    Returns:
        (R, S) and (R, nc) picked cells, and the losses (K,) of the branches. The gradients of the maps are channels-last in memory.
    """
    maps = [level for branch in branches for level in branch]
    return _CellsAndBackground.apply(row, tables, len(branches), gamma, class_weights, *maps)  # type: ignore[no-any-return]


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


def cells_at(branches: Sequence[Sequence[Tensor]], row: Tensor) -> Tensor:
    """Values (R, C) of cells of K branches' maps (B, C, H, W), which are rows (R,) of the tables of :func:`as_tables`; in float32."""
    maps = [level for branch in branches for level in branch]
    return _CellsAt.apply(row, *maps)  # type: ignore[no-any-return]


class _CellsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        ctx.shapes, ctx.dtype = [level.shape for level in maps], maps[0].dtype
        table = torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in maps])
        return table.index_select(0, row).float()

    @staticmethod
    def backward(ctx: Any, grad_cells: Tensor) -> tuple[Tensor | None, ...]:
        (row,) = ctx.saved_tensors
        counts = [batch * h * w for batch, _, h, w in ctx.shapes]
        grad = grad_cells.new_zeros(sum(counts), grad_cells.shape[1])
        grad.scatter_add_(0, row[:, None].expand_as(grad_cells), grad_cells)
        levels = grad.to(ctx.dtype).split(counts)
        return None, *(level.view(b, h, w, c).permute(0, 3, 1, 2) for level, (b, c, h, w) in zip(levels, ctx.shapes))


class _CellsAndBackground(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, row: Tensor, tables: Tables, branches: int, gamma: float, class_weights: Tensor | None, *maps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        sides, logits = tables
        ctx.save_for_backward(row, logits, class_weights)
        ctx.gamma, ctx.sides, ctx.shapes, ctx.dtype = gamma, sides.shape[1], [level.shape for level in maps], maps[0].dtype
        loss = F.softplus(logits)
        loss = loss if gamma == 0 else loss.mul_(logits.sigmoid().pow_(gamma))
        loss = loss if class_weights is None else loss.mul_(class_weights)
        return sides.index_select(0, row), logits.index_select(0, row), loss.view(branches, -1).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad_sides: Tensor, grad_logits: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        row, logits, class_weights = ctx.saved_tensors
        gamma, sides = ctx.gamma, ctx.sides
        grad = logits.new_empty(len(logits), sides + logits.shape[1])
        grad[:, :sides] = 0
        slope = grad[:, sides:]
        slope.copy_(logits).sigmoid_()  # a compiled graph has no ``out=`` for a part of a tensor
        if gamma != 0:  # d/dx p^γ softplus(x) = p^γ (p + γ (1 - p) softplus(x)), p the sigmoid of x
            slope.copy_(slope.pow(gamma) * (slope + gamma * (1 - slope) * F.softplus(logits)))
        if class_weights is not None:
            slope.mul_(class_weights)
        slope.unflatten(0, (len(grad_total), -1)).mul_(grad_total[:, None, None])
        grad.scatter_add_(0, row[:, None].expand(-1, grad.shape[1]), torch.cat((grad_sides, grad_logits), dim=1))
        levels = grad.to(ctx.dtype).split([batch * h * w for batch, _, h, w in ctx.shapes])
        maps = (level.view(b, h, w, c).permute(0, 3, 1, 2) for level, (b, c, h, w) in zip(levels, ctx.shapes))
        return None, None, None, None, None, *maps


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
