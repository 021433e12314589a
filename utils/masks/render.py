"""Masks of detections at the size of the image that their boxes are in, packed: from prototypes, or from masks in other coordinates.

Only the window of each box is computed, since masks end at their boxes: the work grows with the area of the objects, not with their
number times the image. A pixel takes the value at its centre; of prototypes the bilinear one, as if the letterbox's border were cut off
and the rest resized (as YOLACT's masks are drawn at the original's size).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.errors import UserError
from utils.masks.packed import Packed, pack_tensor, packed_width

MAX_MASK_BYTES = 4 << 30  # of the masks of one image
CHUNK_BYTES = 128 << 20  # of float32 maps that are computed at once on a GPU
Window = Callable[[int, slice, slice], NDArray]  # (which mask, rows, columns) -> (rows, columns) true where it is


class Placement(NamedTuple):
    """Where the pixels of an image lie in other coordinates: ``xy_source = xy * scale + pad``, px from corners."""

    hw: tuple[int, int]  # height and width of the image that masks are made for
    scale_xy: tuple[float, float]
    pad_xy: tuple[float, float]

    def inverse(self, hw: tuple[int, int]) -> Placement:
        """The way back, to an image of ``hw`` px."""
        (sx, sy), (px, py) = self.scale_xy, self.pad_xy
        return Placement(hw, (1 / sx, 1 / sy), (-px / sx, -py / sy))


class Axis(NamedTuple):
    """For each pixel of a side: the two cells of the prototypes that it lies between, and the weight of the second."""

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    weight: NDArray[np.float32]

    @staticmethod
    def of(pixels: int, scale: float, pad: float, *, cells: int, cell_px: int) -> Axis:
        """``pixels`` of the image over ``cells`` of ``cell_px`` px of the network's input; beyond the image its border is repeated."""
        first, last = pad / cell_px, (pad + pixels * scale) / cell_px - 1
        at = np.clip(((np.arange(pixels) + 0.5) * scale + pad) / cell_px - 0.5, first, max(last, first)).clip(0, cells - 1)
        low = np.floor(at).astype(np.int64)
        return Axis(low, np.minimum(low + 1, cells - 1), (at - low).astype(np.float32))


def prototype_masks_at(coefficients: Tensor, prototypes: Tensor, boxes_xyxy: Tensor, placement: Placement, *, cell_px: int) -> Tensor:
    """Masks of one image, cropped to their boxes.

    Args:
        coefficients: (n, K).
        prototypes: (K, h, w), a cell for ``cell_px`` px of the network's input.
        boxes_xyxy: (n, 4) px of the image that masks are made for, on any device.
        placement: where its pixels lie in the network's input.
        cell_px: px of the input for each cell.

    Returns:
        (n, H, ceil(W / 8)) uint8 on the CPU, packed.

    Raises:
        UserError: they would need more than ``MAX_MASK_BYTES``.
    """
    h, w = prototypes.shape[1:]
    check_memory(len(coefficients), placement.hw)
    rows, columns = axes_of(placement, (h, w), cell_px=cell_px)
    flat = prototypes.float().flatten(1)
    if prototypes.device.type != "cpu":
        return _whole_images(coefficients.float(), flat.unflatten(1, (h, w)), boxes_xyxy, rows, columns)
    logits = (coefficients.float() @ flat).unflatten(1, (h, w)).numpy()

    def window(index: int, ys: slice, xs: slice) -> NDArray:
        source, top, left = logits[index], int(rows.low[ys.start]), int(columns.low[xs.start])
        source = source[top : int(rows.high[ys.stop - 1]) + 1, left : int(columns.high[xs.stop - 1]) + 1]
        down = _between(source[rows.low[ys] - top], source[rows.high[ys] - top], rows.weight[ys, None])
        return _between(down[:, columns.low[xs] - left], down[:, columns.high[xs] - left], columns.weight[xs]) > 0

    return torch.from_numpy(_in_windows(boxes_xyxy, placement.hw, window))


def axes_of(placement: Placement, cells_hw: tuple[int, int], *, cell_px: int) -> tuple[Axis, Axis]:
    """Rows and columns of an image over the cells of its prototypes."""
    (height, width), (sx, sy), (px, py) = placement
    return Axis.of(height, sy, py, cells=cells_hw[0], cell_px=cell_px), Axis.of(width, sx, px, cells=cells_hw[1], cell_px=cell_px)


def masks_at(packed: Tensor, boxes_xyxy: Tensor, placement: Placement) -> Tensor:
    """Masks that are known in other coordinates, cropped to their boxes: the nearest pixel's value, none outside.

    Args:
        packed: (n, h, ceil(w / 8)) uint8.
        boxes_xyxy: (n, 4) px of the image that masks are made for.
        placement: where its pixels lie in ``packed``.

    Returns:
        (n, H, ceil(W / 8)) uint8 on the CPU.
    """
    known, (height, width) = packed.cpu().numpy(), placement.hw
    check_memory(len(known), placement.hw)
    y, x = (
        np.floor((np.arange(side) + 0.5) * scale + pad).astype(np.int64)
        for side, scale, pad in zip((height, width), placement.scale_xy[::-1], placement.pad_xy[::-1])
    )
    inside_y, inside_x = (y >= 0) & (y < known.shape[1]), (x >= 0) & (x < 8 * known.shape[2])
    y, x = y.clip(0, max(known.shape[1] - 1, 0)), x.clip(0, max(8 * known.shape[2] - 1, 0))
    byte, shift = x >> 3, (7 - (x & 7)).astype(np.uint8)

    def window(index: int, ys: slice, xs: slice) -> NDArray:
        bits = (known[index][y[ys, None], byte[xs]] >> shift[xs]) & 1
        return (bits > 0) & inside_y[ys, None] & inside_x[xs]

    return torch.from_numpy(_in_windows(boxes_xyxy, placement.hw, window))


class MaskMemoryError(UserError):
    """The masks of one image would need too much memory; others may not."""


def check_memory(count: int, hw: tuple[int, int]) -> None:
    """Refuses masks that would need more than ``MAX_MASK_BYTES``.

    Raises:
        MaskMemoryError: they would.
    """
    if (needed := count * hw[0] * packed_width(hw[1])) > MAX_MASK_BYTES:
        size = f"{count} masks of {hw[1]}x{hw[0]} px need {needed / 2**30:.1f} GiB"
        raise MaskMemoryError(f"{size}, more than {MAX_MASK_BYTES >> 30}; lower --max-det, raise --conf-thres, or give smaller images")


def _in_windows(boxes_xyxy: Tensor, hw: tuple[int, int], window: Window) -> Packed:
    """Packed masks that are zero outside of their boxes: a pixel is inside where x1 <= column < x2, rows alike.

    One mask after another: their windows have any size, and a call on each costs less than one on all pixels of all images.
    """
    height, width = hw
    packed = np.zeros((len(boxes_xyxy), height, packed_width(width)), np.uint8)
    corners = np.nan_to_num(np.ceil(boxes_xyxy.detach().cpu().double().numpy())).clip(0, np.array((width, height, width, height)))
    for index, (left, top, right, bottom) in enumerate(corners.astype(np.int64).tolist()):
        if right > left and bottom > top:
            first = left // 8 * 8  # whole bytes
            part = window(index, slice(top, bottom), slice(first, right))
            part[:, : left - first] = False
            packed[index, top:bottom, first // 8 : packed_width(right)] = np.packbits(part, axis=1)
    return packed


def _whole_images(coefficients: Tensor, prototypes: Tensor, boxes_xyxy: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """The same on the device of the prototypes, some whole maps at a time: there few calls matter, not few pixels."""
    device, (height, width) = prototypes.device, (len(rows.low), len(columns.low))
    (y0, y1, wy), (x0, x1, wx) = (tuple(torch.from_numpy(t).to(device) for t in axis) for axis in (rows, columns))
    left, top, right, bottom = boxes_xyxy.to(device).unsqueeze(-1).unbind(1)  # (n, 1) each
    across = torch.arange(width, device=device), torch.arange(height, device=device)
    inside_x, inside_y = (across[0] >= left) & (across[0] < right), (across[1] >= top) & (across[1] < bottom)
    parts = [torch.zeros(0, height, packed_width(width), dtype=torch.uint8)]
    for chunk in torch.arange(len(coefficients)).split(max(CHUNK_BYTES // (4 * height * width), 1)):
        part = slice(int(chunk[0]), int(chunk[-1]) + 1) if len(chunk) else slice(0, 0)
        logits = torch.einsum("nk,khw->nhw", coefficients[part], prototypes)
        down = torch.lerp(logits[:, y0], logits[:, y1], wy[:, None])
        found = torch.lerp(down[:, :, x0], down[:, :, x1], wx) > 0
        parts.append(pack_tensor(found & inside_y[part, :, None] & inside_x[part, None]).cpu())
    return torch.cat(parts)


def _between(low: NDArray, high: NDArray, weight: NDArray) -> NDArray:
    """Linear interpolation; ``high`` is overwritten."""
    high -= low
    high *= weight
    high += low
    return high
