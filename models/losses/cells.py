"""The two things a loss wants of a head's maps: a few cells, and the class loss of all cells as if they were background.

Written as one differentiable operation, because its gradient is then one pass over the maps. Left to autograd, the same takes five
passes, each over a fresh tensor of the size of the maps, and is most of the time of a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cells_and_background(maps: Sequence[Tensor], cell: Tensor, *, sides: int, gamma: float = 0.0) -> tuple[Tensor, Tensor]:
    """Picks cells and sums the background loss p^γ · −log(1 − p) over all cells and classes, p the class scores.

    Args:
        maps: one (B, C, H, W) a level, float32; channels from ``sides`` on are class logits.
        cell: (B, R) int64, index of a cell over all levels, cells row by row.
        sides: channels before the class logits.
        gamma: exponent γ of the focal weight; 0 is the binary cross entropy.

    Returns:
        (B, C, R) picked cells, and a scalar.
    """
    return _CellsAndBackground.apply(cell, sides, gamma, *maps)  # type: ignore[no-any-return]


class _CellsAndBackground(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: Tensor, sides: int, gamma: float, *maps: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cell, *maps)
        ctx.sides, ctx.gamma = sides, gamma
        rows = maps[0].new_zeros(len(cell), maps[0].shape[1], cell.shape[1])
        total = maps[0].new_zeros(())
        for level, index, here in _by_level(maps, cell):
            rows += level.flatten(2).gather(2, index.expand_as(rows)) * here
            logits = level[:, sides:]
            loss = F.softplus(logits)
            total += (loss if gamma == 0 else loss.mul_(logits.sigmoid().pow_(gamma))).sum()
        return rows, total

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        cell, *maps = ctx.saved_tensors
        sides, gamma = ctx.sides, ctx.gamma
        grads = []
        for level, index, here in _by_level(maps, cell):
            grad = torch.empty_like(level, memory_format=torch.contiguous_format)
            grad[:, :sides] = 0
            slope = grad[:, sides:]
            torch.sigmoid(level[:, sides:], out=slope)
            if gamma != 0:  # d/dx p^γ softplus(x) = p^γ (p + γ (1 - p) softplus(x)), p the sigmoid of x
                slope.copy_(slope.pow(gamma) * (slope + gamma * (1 - slope) * F.softplus(level[:, sides:])))
            slope.mul_(grad_total)
            grad.flatten(2).scatter_add_(2, index.expand_as(grad_rows), grad_rows * here)
            grads.append(grad)
        return None, None, None, *grads


def _by_level(maps: Sequence[Tensor], cell: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each level with the cells' index in it, and whether they are in it, both (B, 1, R)."""
    levels, start = [], 0
    for level in maps:
        count = level.shape[2] * level.shape[3]
        here = (cell >= start) & (cell < start + count)
        levels.append((level, (cell - start).clamp(0, count - 1)[:, None], here[:, None]))
        start += count
    return levels
