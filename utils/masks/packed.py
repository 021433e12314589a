"""Binary masks with eight pixels in a byte: (…, h, w) of 0 and 1 as (…, h, ceil(w / 8)), the leftmost pixel in the highest bit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Packed = NDArray[np.uint8]


def packed_width(width: int) -> int:
    """Bytes in a row of so many pixels."""
    return -(-width // 8)


def pack(masks: NDArray) -> Packed:
    """Masks (…, h, w), zero or not, to (…, h, ceil(w / 8)) uint8."""
    return np.packbits(np.asarray(masks, bool), axis=-1)


def unpack(packed: Packed, width: int) -> NDArray[np.uint8]:
    """The inverse of ``pack``: (…, h, width) of 0 and 1."""
    return np.unpackbits(packed, axis=-1, count=width)


def pack_tensor(masks: Tensor) -> Tensor:
    """``pack`` of a tensor, on its device."""
    bits = torch.nn.functional.pad(masks.to(torch.uint8), (0, -masks.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << _shifts(masks.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_tensor(packed: Tensor, width: int) -> Tensor:
    """``unpack`` of a tensor, on its device: (…, h, width) uint8 of 0 and 1."""
    return ((packed.unsqueeze(-1) >> _shifts(packed.device)) & 1).flatten(-2)[..., :width]


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, device=device, dtype=torch.uint8)


class Extents(NamedTuple):
    """The smallest window about each of n masks, in rows and bytes; empty (stop = start = 0) where a mask is."""

    top: NDArray[np.int64]  # (n,)
    bottom: NDArray[np.int64]  # (n,) exclusive
    left: NDArray[np.int64]  # (n,) byte
    right: NDArray[np.int64]  # (n,) byte, exclusive

    @staticmethod
    def of(packed: Packed) -> Extents:
        """Of masks (n, h, ceil(w / 8))."""
        (top, bottom), (left, right) = (_span(np.asarray(packed.any(axis=axis))) for axis in (2, 1))
        return Extents(top, bottom, left, right)

    def window(self, index: int) -> tuple[slice, slice]:
        """Rows and bytes of one mask."""
        return slice(int(self.top[index]), int(self.bottom[index])), slice(int(self.left[index]), int(self.right[index]))


def _span(used: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and one past the last true place of each row (n, k); zeros where none is."""
    if not used.shape[1]:
        return np.zeros(len(used), np.int64), np.zeros(len(used), np.int64)
    some = used.any(axis=1)
    return np.where(some, used.argmax(axis=1), 0), np.where(some, used.shape[1] - used[:, ::-1].argmax(axis=1), 0)
