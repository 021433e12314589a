"""YOLO26's measure of overlap for the assignment: the mean of that of the boxes and that of the masks.

The masks of a box's best candidates alone are computed; the overlap of the others counts as 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.assigners.targets import can_count_without_wait
from models.losses.mask_pixels import Grid, Rectangles, chunks, grouped
from models.losses.masks import SLICE_VALUES, cells_of_map, inside_boxes

EPS = 1e-7  # of the overlap of two empty masks


class MaskOverlap:
    """The measure, for predictions of K branches with B images of N cells each.

    Args:
        coefficients: (K · B · N, C).
        prototypes: (K, B, C, h, w).
        boxes_xyxy: (K, B, N, 4) px, predicted.
        grid: the map and the objects' masks.
        target_row: (B, n) row of the masks for each place of the padded boxes.

    Attributes:
        best: of a box's candidates, as a multiple of those that it is assigned, whose masks are measured.
    """

    best = 3

    def __init__(self, coefficients: Tensor, prototypes: Tensor, boxes_xyxy: Tensor, grid: Grid, target_row: Tensor) -> None:
        self.coefficients, self.prototypes, self.grid = coefficients, prototypes, grid
        self.boxes, self.target_row = grid.to_cells(boxes_xyxy.flatten(0, 2)), target_row.flatten()
        self.cells = boxes_xyxy.shape[2]
        self.key = self.target_row.new_zeros(0)
        self.iou = coefficients.new_zeros(0)

    def measure(self, place: Tensor, number: Tensor, valid: Tensor) -> None:
        """Computes the overlaps of the masks of some pairs.

        Args:
            place: (P,) int64, predictions, counted over branches, images and cells.
            number: (P,) int64, boxes, counted over images and the n places of each.
            valid: (P,) bool, which count.
        """
        if can_count_without_wait(place):
            place, number = place[valid], number[valid]
            iou = self._in_boxes(place, self.target_row[number])
        else:
            iou = self._in_slices(place, self.target_row[number]) * valid
        key, order = self._key(place, number).sort()
        self.key, self.iou = key, iou[order]

    def __call__(self, overlap: Tensor, *, place: Tensor, number: Tensor) -> Tensor:
        """The mean of ``overlap`` and the overlap of the masks."""
        if self.key.numel() == 0:
            return overlap / 2
        key = self._key(place, number).expand_as(overlap).contiguous()
        at = torch.searchsorted(self.key, key).clamp_(max=len(self.key) - 1)
        return (overlap + self.iou[at] * (self.key[at] == key)) / 2

    def _key(self, place: Tensor, number: Tensor) -> Tensor:
        return place * len(self.target_row) + number

    def _in_boxes(self, place: Tensor, target: Tensor) -> Tensor:
        """IoU (P,) of predicted masks, cut to their boxes, with masks; all candidates of an object on the cells of their boxes together."""
        _, _, k, h, w = self.prototypes.shape
        maps = self.prototypes.permute(0, 1, 3, 4, 2).reshape(-1, k)
        sheet = torch.div(place, self.cells, rounding_mode="floor")  # (P,) of the branch and image
        objects, owner = torch.unique(sheet * len(self.grid.masks) + target, return_inverse=True)
        boxes = self.boxes[place]
        groups = grouped(owner, _union(owner, boxes, len(objects), self.grid.hw))
        shared, own = torch.zeros(len(place) + 1), torch.zeros(len(place) + 1)
        members, edges = self.coefficients[place], F.pad(boxes, (0, 0, 0, 1))
        members = F.pad(members, (0, 0, 0, 1))
        of_sheet, of_target = (torch.div(objects, len(self.grid.masks), rounding_mode="floor"), objects % max(len(self.grid.masks), 1))
        for part in chunks(groups):
            member, group = part.groups.member, part.groups.owner
            at = (of_sheet[group][:, None] * h + part.row) * w + part.column
            values = maps.index_select(0, at.flatten()).unflatten(0, at.shape).float()
            x1, y1, x2, y2 = edges[member][:, None].unbind(-1)  # (g, 1, G)
            row, column = part.row[..., None], part.column[..., None]
            masks = values @ members[member].transpose(1, 2) > 0  # (g, A, G)
            masks &= (column >= x1) & (column < x2) & (row >= y1) & (row < y2) & part.inside[..., None]
            masks = masks.float()
            true = self.grid.bits(of_target[group][:, None], part.row, part.column).float()
            shared[member], own[member] = (true[:, None] @ masks).squeeze(1), masks.sum(dim=1)
        return self._iou(shared[:-1], own[:-1], target)

    def _in_slices(self, place: Tensor, target: Tensor) -> Tensor:
        """The same, over all cells of the map, in slices whose size depends on no value."""
        h, w = self.grid.hw
        flat = self.prototypes.flatten(0, 1).flatten(2).float()  # (K · B, C, h · w)
        row, column = cells_of_map((h, w), place.device)
        sheets = len(flat)
        place, target = place.view(sheets, -1), target.view(sheets, -1)
        shared, own = [], []
        step = max(1, SLICE_VALUES // max(1, sheets * h * w))
        for i in range(0, place.shape[1], step):
            here, of = place[:, i : i + step], target[:, i : i + step]
            masks = (self.coefficients[here] @ flat > 0) & inside_boxes(self.boxes[here], row, column)
            own.append(masks.sum(dim=2))
            shared.append((masks & self.grid.bits(of[..., None], row, column).bool()).sum(dim=2))
        return self._iou(torch.cat(shared, dim=1).flatten().float(), torch.cat(own, dim=1).flatten().float(), target.flatten())

    def _iou(self, shared: Tensor, own: Tensor, target: Tensor) -> Tensor:
        true = self.true_areas()[target]
        return shared / (own + true - shared + EPS)

    def true_areas(self) -> Tensor:
        """Cells (M,) of the map that each object's mask covers."""
        grid, masks = self.grid, self.grid.masks
        if len(masks) == 0:
            return self.boxes.new_zeros(1)
        if grid.hw == grid.mask_hw:
            return _ones(masks).flatten(1).sum(dim=1).float()
        rows, columns = (torch.arange(side, device=masks.device) for side in grid.hw)
        step = max(1, SLICE_VALUES // (4 * grid.hw[0] * grid.hw[1]))
        numbers = torch.arange(len(masks), device=masks.device).split(step)
        return torch.cat([grid.bits(n[:, None, None], rows[:, None], columns).flatten(1).sum(dim=1) for n in numbers]).float()


def _ones(packed: Tensor) -> Tensor:
    """How many bits of each byte are set."""
    pairs = packed - ((packed >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F


def _union(owner: Tensor, boxes: Tensor, count: int, hw: tuple[int, int]) -> Rectangles:
    """The rectangle around the boxes (P, 4) of each of ``count`` owners."""
    boxes = boxes.nan_to_num(0)  # one prediction without a number must not hide the others
    sides = torch.cat((boxes[:, :2], -boxes[:, 2:]), dim=1)
    least = sides.new_full((count, 4), torch.inf).scatter_reduce_(0, owner[:, None].expand_as(sides), sides, "amin")
    return Rectangles.of(torch.cat((least[:, :2], -least[:, 2:]), dim=1), hw)
