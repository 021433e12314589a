"""What both forms of bi-level routing attention show: the regions that a region chose, and what one pixel attends to inside them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.layers.explained import PlaneMap, Regions, View, query_weights


def chosen_weights(query: Tensor, keys: Tensor, *, heads: int, scale: float, factors: Tensor | None = None) -> Tensor:
    """Attention of one pixel to the keys of the regions that its region chose, all of them in one softmax.

    Args:
        query: (Q,).
        keys: (K, S, Q), S keys in each of K regions.
        heads: number of heads, contiguous groups of channels.
        scale: factor of the logits.
        factors: (K,) of the keys, of soft routing.

    Returns:
        (heads, K, S).
    """
    scaled = keys if factors is None else keys * factors[:, None, None].to(keys.dtype)
    by_head = scaled.flatten(0, 1).unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, K S, d)
    return query_weights(query.unflatten(0, (heads, -1)), by_head, scale=scale).unflatten(1, keys.shape[:2])


class RegionGrid(NamedTuple):
    """How a map is cut into regions.

    Attributes:
        regions: rows and columns of regions.
        window: height and width of a region in pixels.
        map_hw: height and width of the map; the regions may reach beyond it.
    """

    regions: tuple[int, int]
    window: tuple[int, int]
    map_hw: tuple[int, int]

    def place_of(self, row: int, column: int) -> tuple[int, int]:
        """Number of a pixel's region, and of the pixel in it."""
        height, width = self.window
        return row // height * self.regions[1] + column // width, row % height * width + column % width

    def views(self, region: int, index: Tensor, weights: Tensor) -> tuple[View, ...]:
        """
        Args:
            region: the query's.
            index: (regions, K) what each region chose.
            weights: (K, S) what the query gives each key of the regions that its own chose.
        """
        by_region = weights.sum(1)
        counts = torch.bincount(index.flatten(), minlength=self.regions[0] * self.regions[1]).float()
        chosen = f"region of the query and its top {index.shape[1]}"
        return (
            Regions(chosen, self._boxes(torch.tensor([region]))[0], self._boxes(index[region]), by_region),
            PlaneMap("attention of the query to the pixels of these regions", self._painted(index[region], weights), at_query=True),
            PlaneMap("how many regions choose each region", counts.view(self.regions), reach=self._reach),
        )

    @property
    def _reach(self) -> tuple[float, float]:
        rows, columns = (count * side / whole for count, side, whole in zip(self.regions, self.window, self.map_hw))
        return rows, columns

    def _boxes(self, numbers: Tensor) -> Tensor:
        """(K,) regions -> (K, 4) xyxy as fractions of the map, cut at its border."""
        numbers = numbers.cpu()
        rows, columns = numbers // self.regions[1], numbers % self.regions[1]
        (height, width), (map_h, map_w) = self.window, self.map_hw
        corners = torch.stack((columns * width, rows * height, (columns + 1) * width, (rows + 1) * height), 1)
        return (corners / torch.tensor([map_w, map_h, map_w, map_h])).clamp(max=1)

    def _painted(self, numbers: Tensor, weights: Tensor) -> Tensor:
        """Weights (K, S) at the pixels of their regions, spread evenly where keys are fewer than pixels: (H, W)."""
        height, width = self.window
        pixels = height * width
        per_pixel = weights if weights.shape[1] == pixels else weights.mean(1, keepdim=True).expand(-1, pixels) * weights.shape[1] / pixels
        plane = weights.new_zeros(self.regions[0] * self.regions[1], pixels)
        plane[numbers] = per_pixel
        grid = plane.view(*self.regions, height, width).transpose(1, 2).reshape(self.regions[0] * height, self.regions[1] * width)
        return grid[: self.map_hw[0], : self.map_hw[1]]
