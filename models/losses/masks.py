"""The loss of predicted masks: binary cross entropy of coefficients times prototypes within the boxes of the objects.

YOLACT, arXiv 1904.02689, section 3.2. For a cell with the coefficients c that learns an object with the box of area a and the mask t,
the loss is Σ BCE(c · p, t) / a over the cells of the prototypes p inside the box.

A mask of the whole image is computed for no object: on a CPU only the cells of the boxes, for all cells that learn one object together; on
a GPU, where the host does not know which cell learns which object, slices of a bounded size. The gradient is computed along with the loss,
so that nothing but it is kept until the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.assigners.targets import can_count_without_wait
from models.losses.mask_pixels import Grid, Rectangles, chunks, grouped

SLICE_VALUES = 1 << 24  # values of masks at once on a GPU


class Learned(NamedTuple):
    """What P cells learn."""

    image: Tensor  # (P,) int64
    target: Tensor  # (P,) int64, row of the masks
    weight: Tensor  # (P,) float32, factor of the cell's loss; 0 for what does not count


def mask_loss(coefficients: Tensor, prototypes: Tensor, learned: Learned, boxes_xyxy: Tensor, grid: Grid) -> Tensor:
    """The weighted sum of the losses of P cells, a scalar in float32.

    Args:
        coefficients: (P, K); where sizes must not depend on values, as many for each of the B images, image by image.
        prototypes: (B, K, h, w), in any dtype.
        learned: without gradient.
        boxes_xyxy: (M, 4) px of the objects.
        grid: the map and the objects' masks.
    """
    wanted = torch.is_grad_enabled() and (coefficients.requires_grad or prototypes.requires_grad)
    return _MaskLoss.apply(coefficients, prototypes, learned, boxes_xyxy, grid, wanted)  # type: ignore[no-any-return]


class _MaskLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, prototypes: Tensor, learned: Learned, boxes_xyxy: Tensor, grid: Grid, wanted: bool
    ) -> Tensor:
        compute = _in_boxes if can_count_without_wait(coefficients) else _in_slices
        with torch.no_grad():
            total, *gradients = compute(coefficients.float(), prototypes, learned, grid.to_cells(boxes_xyxy), grid, wanted=wanted)
        ctx.dtypes = coefficients.dtype, prototypes.dtype
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, prototypes = ((g * grad).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return coefficients, prototypes, None, None, None, None


def _in_boxes(coefficients: Tensor, prototypes: Tensor, learned: Learned, boxes: Tensor, grid: Grid, *, wanted: bool) -> tuple[Tensor, ...]:
    """The loss and, if wanted, its gradients; each object's cells of the map once for all that learn it."""
    (batch, k, h, w), rectangles = prototypes.shape, Rectangles.of(boxes, grid.hw)
    weight = learned.weight / box_area(boxes)[learned.target]
    table = prototypes.permute(0, 2, 3, 1).reshape(-1, k)  # (B · h · w, K): a view of channels-last memory
    members, weights = F.pad(coefficients, (0, 0, 0, 1)), F.pad(weight, (0, 1))
    image = torch.zeros(len(boxes), dtype=torch.long).index_copy_(0, learned.target, learned.image)
    total = coefficients.new_zeros(())
    slopes, gradient = (torch.zeros_like(members), coefficients.new_zeros(table.shape)) if wanted else (members, members)
    for part in chunks(grouped(learned.target, rectangles)):
        owner, member = part.groups.owner, part.groups.member
        at = (image[owner][:, None] * h + part.row) * w + part.column  # (g, A)
        values = table.index_select(0, at.flatten()).unflatten(0, at.shape).float()  # (g, A, K)
        mine, factor = members[member], weights[member]  # (g, G, K), (g, G)
        logits = values @ mine.transpose(1, 2)  # (g, A, G)
        true = grid.bits(owner[:, None], part.row, part.column).to(logits.dtype)[..., None]
        inside = part.inside.to(logits.dtype)
        loss = F.softplus(logits).sub_(logits * true)
        total += ((inside[:, None] @ loss).squeeze(1) * factor).sum()
        if wanted:
            slope = logits.sigmoid_().sub_(true).mul_(inside[..., None])
            slopes[member] = (slope.transpose(1, 2) @ values) * factor[..., None]
            _add_rows(gradient, at, slope @ (mine * factor[..., None]))
    return (total, slopes[:-1], gradient.view(batch, h, w, k).permute(0, 3, 1, 2)) if wanted else (total,)


def _add_rows(table: Tensor, at: Tensor, rows: Tensor) -> None:
    """Adds rows (g, A, K) to a table (T, K) in place."""
    table.scatter_add_(0, at.flatten()[:, None].expand(-1, table.shape[1]), rows.flatten(0, 1))


def _in_slices(
    coefficients: Tensor, prototypes: Tensor, learned: Learned, boxes: Tensor, grid: Grid, *, wanted: bool
) -> tuple[Tensor, ...]:
    """The same over all cells of the map, so many learning cells at once that memory is bounded; no size depends on values."""
    (batch, k, h, w), dtype = prototypes.shape, coefficients.dtype
    flat = prototypes.flatten(2).to(dtype)  # (B, K, h · w)
    mine = coefficients.unflatten(0, (batch, -1))
    target, weight = learned.target.view(batch, -1), (learned.weight / box_area(boxes)[learned.target]).view(batch, -1)
    total, slopes, gradient = coefficients.new_zeros(()), torch.zeros_like(mine), torch.zeros_like(flat) if wanted else flat
    row, column = cells_of_map((h, w), coefficients.device)
    step = max(1, SLICE_VALUES // max(1, batch * h * w))
    for i in range(0, mine.shape[1], step):
        part, of, factor = mine[:, i : i + step], target[:, i : i + step], weight[:, i : i + step, None]
        logits = part @ flat  # (B, r, h · w)
        true = grid.bits(of[..., None], row, column).to(dtype)
        inside = inside_boxes(boxes[of], row, column)
        factor = factor * inside
        total += ((F.softplus(logits) - logits * true) * factor).sum()
        if wanted:
            slope = logits.sigmoid_().sub_(true).mul_(factor)
            slopes[:, i : i + step] = slope @ flat.transpose(1, 2)
            gradient += part.transpose(1, 2) @ slope
    return (total, slopes.flatten(0, 1), gradient.view(prototypes.shape)) if wanted else (total,)


def box_area(boxes: Tensor) -> Tensor:
    """Area (M,) of boxes (M, 4) in cells, never 0."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).clamp(min=torch.finfo(boxes.dtype).tiny)


def cells_of_map(hw: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column (h · w,) int64 of all cells."""
    number = torch.arange(hw[0] * hw[1], device=device)
    row = torch.div(number, hw[1], rounding_mode="floor")
    return row, number - row * hw[1]


def inside_boxes(boxes: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Whether cells (A,), or of shapes that broadcast with (..., 1), are inside boxes (..., 4): (..., A) bool."""
    x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(-2)
    return (column >= x1) & (column < x2) & (row >= y1) & (row < y2)
