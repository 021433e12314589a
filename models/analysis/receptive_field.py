"""Receptive fields of a row: what can reach the middle of its map (theoretical), and how much of it does (effective).

Understanding the Effective Receptive Field in Deep Convolutional Neural Networks, arXiv 1701.04128.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.analysis.tracing import check_rows, evaluating
from models.model import Model

SHARES = (0.2, 0.5, 0.99)  # of the gradient's sum; the sides of the squares that hold them are what papers report
PROBES = 2  # random images that the theoretical field is found with
LEAST_WEIGHT, MOST_WEIGHT = 0.5, 1.5  # of the positive weights of its network, before they are divided by their number


@dataclass(frozen=True)
class ReceptiveField:
    """Of the middle cell of one row.

    Attributes:
        row: of the network.
        effective: (H, W) mean magnitude of the gradient of the cell's channels by the input, its maximum 1.
        limits: first row, last row, first column and last column of the input that can reach the cell.
        sides_px: share of the gradient's sum -> side of the square round its middle that holds it.
        middle_yx: of the gradient: its mean place, px.
    """

    row: int
    effective: Tensor
    limits: tuple[int, int, int, int]
    sides_px: dict[float, int]
    middle_yx: tuple[float, float]

    @property
    def theoretical_hw(self) -> tuple[int, int]:
        """Height and width in px of what can reach the cell."""
        top, bottom, left, right = self.limits
        return bottom - top + 1, right - left + 1

    @property
    def clipped_hw(self) -> tuple[bool, bool]:
        """Whether height and width end at a border of the input, so that they may be larger still."""
        (height, width), (top, bottom, left, right) = self.effective.shape, self.limits
        return top == 0 or bottom == height - 1, left == 0 or right == width - 1

    @property
    def whole_input(self) -> bool:
        """Whether all of the input can reach the cell."""
        return self.theoretical_hw == tuple(self.effective.shape)


def receptive_fields(model: Model, images: Iterable[Tensor], rows: Sequence[int]) -> list[ReceptiveField]:
    """The fields of some rows.

    Args:
        model: any.
        images: (1, ch, H, W) in 0-1, all of one size; the effective field is their mean.
        rows: with one map each.
    """
    rows = check_rows(model, rows)
    totals: dict[int, Tensor] = {}
    for image in images:
        for row, one in zip(rows, _middle_gradients(model, image, rows)):
            magnitude = one.abs().sum((0, 1)).float().cpu()
            totals[row] = totals[row] + magnitude if row in totals else magnitude
    limits = theoretical_limits(model, rows, next(iter(totals.values())).shape) if totals else []
    return [_field(row, totals[row], limit) for row, limit in zip(rows, limits)]


def theoretical_limits(model: Model, rows: Sequence[int], hw: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """For each row the rows and columns of the input that can reach its middle cell: first row, last row, first column, last column.

    Found by the gradient of a copy of the network in float64 whose weights are all positive, so that nothing cancels, and whose maxima are
    means, so that every input of theirs counts. Attention that chooses (bi-level routing) shows what it chose for random images.
    """
    probe = _positive(model)
    generator = torch.Generator().manual_seed(0)
    reached = [torch.zeros(tuple(hw), dtype=torch.bool) for _ in rows]
    for _ in range(PROBES):
        image = torch.rand(1, model.ch, *hw, dtype=torch.float64, generator=generator)
        for mask, one in zip(reached, _middle_gradients(probe, image, rows)):
            mask |= (one != 0).any(1)[0]
    return [_extent(mask) for mask in reached]


def _middle_gradients(model: Model, image: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """The gradient of the sum over the channels of each row's middle cell by the image."""
    maps: dict[int, Tensor] = {}
    own = image.detach().clone().requires_grad_()

    class Done(Exception):
        pass

    def call(plan, layer, given):  # type: ignore[no-untyped-def]
        out = maps[plan.index] = layer(given)
        if plan.index >= max(rows):
            raise Done
        return out

    with evaluating(model), torch.enable_grad():
        with suppress(Done):
            model.run_rows(own, call)
        return [_gradient(maps[row], own) for row in rows]


def _gradient(output: Tensor, image: Tensor) -> Tensor:
    middle = output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum()
    if not middle.requires_grad:
        return torch.zeros_like(image)
    found = torch.autograd.grad(middle, image, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(image) if found is None else found


def _positive(model: Model) -> Model:
    """A copy on the CPU in float64: positive weights that keep the size of their input, no bias, no maximum."""
    probe = copy.deepcopy(model).cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in probe.parameters():
            draw = torch.rand(parameter.shape, dtype=torch.float64, generator=generator)
            fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 1
            parameter.copy_((LEAST_WEIGHT + (MOST_WEIGHT - LEAST_WEIGHT) * draw) / fan_in)
        for module in probe.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.zero_()
                module.running_var.fill_(1.0)  # type: ignore[union-attr]
    _replace_maxima(probe)
    return probe


def _replace_maxima(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode))
        else:
            _replace_maxima(child)


def _extent(mask: Tensor) -> tuple[int, int, int, int]:
    rows, columns = (mask.any(dim).nonzero().flatten() for dim in (1, 0))
    if not len(rows):
        return 0, -1, 0, -1
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def _field(row: int, total: Tensor, limit: tuple[int, int, int, int]) -> ReceptiveField:
    most = float(total.max())
    return ReceptiveField(row, total / most if most > 0 else total, limit, *_sides(total))


def _sides(total: Tensor) -> tuple[dict[float, int], tuple[float, float]]:
    """Sides of the squares round the middle of the gradient that hold each of ``SHARES`` of its sum, and that middle."""
    height, width = total.shape
    whole = float(total.sum())
    if whole <= 0:
        return dict.fromkeys(SHARES, 0), (height / 2, width / 2)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    middle = [(total.sum(dim) * place.flatten()).sum() / whole for dim, place in ((1, y), (0, x))]
    distance = torch.maximum((y - middle[0]).abs(), (x - middle[1]).abs()).flatten()
    order = distance.argsort()
    held = total.flatten()[order].cumsum(0) / whole
    sides = {share: int(2 * distance[order[int((held >= share).nonzero()[0])]].ceil()) + 1 for share in SHARES}
    return sides, (float(middle[0]), float(middle[1]))
