"""The pixels of boxes on a map of prototypes: only those are computed, object by object of similar size.

Objects are gathered into groups with one rectangle each, and groups into chunks of similar area, so that little is padded and a chunk's
values stay in the cache. What belongs to one object (cells that were assigned to it, candidates of it) shares its pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_VALUES = 1 << 18  # values of a chunk: those of pixels times those of a group's members
LEAST_CHUNK = 1 << 15  # below it groups of any size go together
SIMILAR = 0.75  # smallest area of a chunk as a share of the largest
LARGEST_GROUP = 32


class Grid(NamedTuple):
    """A map of prototypes and the masks of the objects, whose size may be another."""

    hw: tuple[int, int]  # of the map
    hw_px: tuple[float, float]  # of the images
    masks: Tensor  # (M, mh, ceil(mw / 8)) uint8, bits along the width
    mask_width: int | None = None  # mw; None: what the sides of the images give to mh

    @property
    def mask_hw(self) -> tuple[int, int]:
        """Size of the masks in cells; the last byte of a row may have unused bits."""
        height = self.masks.shape[1]
        return height, self.mask_width or max(1, round(self.hw_px[1] * height / self.hw_px[0]))

    def to_cells(self, boxes_xyxy: Tensor) -> Tensor:
        """Boxes (..., 4) px in cells of the map."""
        (h, w), (height, width) = self.hw, self.hw_px
        columns, rows = boxes_xyxy[..., 0::2] * (w / width), boxes_xyxy[..., 1::2] * (h / height)
        return torch.stack((columns, rows), dim=-1).flatten(-2)

    def bits(self, target: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Whether cells of the map, of any shapes that broadcast, are in the masks of ``target``: 0 or 1, uint8. Nearest neighbour."""
        (h, w), (mh, mw) = self.hw, self.mask_hw
        if (h, w) != (mh, mw):
            row, column = torch.div(row * mh, h, rounding_mode="floor"), torch.div(column * mw, w, rounding_mode="floor")
        _, _, across = self.masks.shape
        at = (target * mh + row) * across + torch.div(column, 8, rounding_mode="floor")
        return (self.masks.view(-1)[at] >> (7 - column % 8).to(torch.uint8)) & 1


class Rectangles(NamedTuple):
    """Whole cells of a map."""

    left: Tensor  # (M,) int64
    top: Tensor
    width: Tensor
    height: Tensor

    @classmethod
    def of(cls, boxes: Tensor, hw: tuple[int, int]) -> Rectangles:
        """The cells in boxes (M, 4) xyxy in cells: a column stays where x1 <= column < x2, rows alike. For a CPU."""
        most = boxes.new_tensor((hw[1], hw[0]))
        edges = torch.minimum(boxes.nan_to_num(0).ceil().clamp(min=0).unflatten(-1, (2, 2)), most).long()  # (M, 2, 2)
        sizes = (edges[:, 1] - edges[:, 0]).clamp(min=0)
        return cls(edges[:, 0, 0], edges[:, 0, 1], sizes[:, 0], sizes[:, 1])

    @property
    def area(self) -> Tensor:
        """(M,) cells."""
        return self.width * self.height

    def at(self, index: Tensor) -> Rectangles:
        """Those of an index."""
        return Rectangles(*(t[index] for t in self))


class Groups(NamedTuple):
    """Members by what they belong to, at most G a group: groups of one object may be several."""

    member: Tensor  # (g, G) int64, which member; their number where there is none
    owner: Tensor  # (g,) int64, the object
    rectangles: Rectangles  # (g,)


class Pixels(NamedTuple):
    """A chunk of g groups with A cells each."""

    groups: Groups
    row: Tensor  # (g, A) int64
    column: Tensor  # (g, A) int64
    inside: Tensor  # (g, A) bool, which are no padding


def grouped(owner: Tensor, rectangles: Rectangles) -> Groups:
    """Groups of members (P,) by their owners, each with its owner's rectangle (M,). Asks the device for sizes: for a CPU."""
    count = len(owner)
    order = owner.argsort(stable=True)
    owner = owner[order]
    counts = torch.bincount(owner)
    rank = torch.arange(count) - (counts.cumsum(0) - counts)[owner]
    size = max(1, min(int(counts.max()) if len(counts) else 0, LARGEST_GROUP))
    first = rank % size == 0  # of a group
    group = first.cumsum(0) - 1
    member = torch.full((int(first.sum()), size), count)
    member[group, rank % size] = order
    owner = owner[first]
    return Groups(member, owner, rectangles.at(owner))


def chunks(groups: Groups) -> Iterator[Pixels]:
    """The cells of all groups, largest first; empty rectangles are left out. For a CPU."""
    area, order = groups.rectangles.area.sort(descending=True)
    sizes, size, start = area.neg().contiguous(), groups.member.shape[1], 0
    count = int((area > 0).sum())
    while start < count:
        largest = int(area[start])
        similar = int(torch.searchsorted(sizes, -SIMILAR * largest, right=True))
        least = start + LEAST_CHUNK // (largest * size)
        end = min(count, max(similar, least, start + 1), start + max(1, CHUNK_VALUES // (largest * size)))
        yield _pixels(groups, order[start:end], largest)
        start = end


def _pixels(groups: Groups, chosen: Tensor, largest: int) -> Pixels:
    part = Groups(groups.member[chosen], groups.owner[chosen], groups.rectangles.at(chosen))
    rectangles = part.rectangles
    number = torch.arange(largest)
    inside = number < rectangles.area[:, None]
    row = torch.div(number, rectangles.width[:, None], rounding_mode="floor")
    column = number - row * rectangles.width[:, None]
    row, column = (t * inside for t in (row, column))
    return Pixels(part, row + rectangles.top[:, None], column + rectangles.left[:, None], inside)
