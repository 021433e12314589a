"""Layers that only move, join or pick maps; those with several inputs take one argument, the list of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.conv import Conv, Size
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("Silence", "nn.Identity", channels=rules.keep_width)
class Silence(nn.Module):
    """The identity; YOLOv9's first row, which lets a later row read the image. ``deploy()`` removes such rows."""

    is_identity = True

    def forward(self, x: Tensor) -> Tensor:
        return x


@register("Concat", channels=rules.concat)
class Concat(nn.Module):
    """Joins maps of one height and width along the channels; list of (B, Cᵢ, H, W) to (B, ΣCᵢ, H, W)."""

    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        _require_channels(dimension, "Concat joins")

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(maps), 1)


@register("Shortcut", channels=rules.add)
class Shortcut(nn.Module):
    """Adds maps of one shape; list of (B, C, H, W) to (B, C, H, W). ``dimension`` occurs in YOLOv7's files and is ignored."""

    def __init__(self, dimension: int = 0) -> None:
        super().__init__()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        total = maps[0]
        for other in maps[1:]:
            total = total + other
        return total


@register("CBLinear", channels=rules.split_maps)
class CBLinear(nn.Module):
    """One 1×1 convolution cut into several maps: (B, c1, H, W) to a tuple of (B, widths[i], H, W).

    Source: CBNet, arXiv 1909.03625, as the auxiliary branch of YOLOv9 (arXiv 2402.13616) uses it.
    """

    def __init__(self, c1: int, widths: Sequence[int], k: int = 1, s: int = 1, p: int | None = None, g: int = 1) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.conv = nn.Conv2d(c1, sum(widths), k, s, k // 2 if p is None else p, groups=g)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x).split(self.widths, 1)


@register("CBFuse", channels=rules.select_and_add)
class CBFuse(nn.Module):
    """Picks one map from each :class:`CBLinear`, resizes it to the last input's size by nearest neighbour, and adds all to that input.

    List of tuples and a last (B, C, H, W) to (B, C, H, W); ``choices[i]`` is the map taken of input i. Source as for CBLinear.
    """

    def __init__(self, choices: Sequence[int]) -> None:
        super().__init__()
        self.choices = tuple(choices)

    def forward(self, inputs: Sequence[Tensor | tuple[Tensor, ...]]) -> Tensor:
        total: Any = inputs[-1]  # a map, where the others are tuples of maps
        size = total.shape[2:]
        for choice, maps in zip(self.choices, inputs):
            total = total + F.interpolate(maps[choice], size=size, mode="nearest")
        return total


@register("ReOrg", channels=rules.rearrange(lambda c: 4 * c))
class ReOrg(nn.Module):
    """Every second pixel becomes channels (YOLOR, arXiv 2105.04206); (B, C, H, W) to (B, 4C, H/2, W/2), column offset major."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.view(b, c, h // 2, 2, w // 2, 2)
        return x.permute(0, 5, 3, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


@register("Focus", channels=rules.out_width)
class Focus(nn.Module):
    """:class:`ReOrg` and a convolution: YOLOv5's first stem; (B, c1, H, W) to (B, c2, H/2, W/2)."""

    def __init__(self, c1: int, c2: int, k: Size = 1, s: int = 1, p: Size | None = None, g: int = 1) -> None:
        super().__init__()
        self.reorg = ReOrg()
        self.conv = Conv(4 * c1, c2, k, s, p, g)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.reorg(x))


@register("Contract", channels=rules.rearrange(lambda c, gain=2: c * gain**2))
class Contract(nn.Module):
    """Space into channels (YOLOv5); (B, C, H, W) to (B, C·g², H/g, W/g), row offset major, then column, then channel."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        g = self.gain
        x = x.view(b, c, h // g, g, w // g, g)
        return x.permute(0, 3, 5, 1, 2, 4).reshape(b, c * g * g, h // g, w // g)


@register("Expand", channels=rules.rearrange(lambda c, gain=2: c // gain**2))
class Expand(nn.Module):
    """Channels into space, the inverse of :class:`Contract` (YOLOv5); (B, C, H, W) to (B, C/g², g·H, g·W)."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        g = self.gain
        x = x.view(b, g, g, c // (g * g), h, w)
        return x.permute(0, 3, 4, 1, 5, 2).reshape(b, c // (g * g), h * g, w * g)


@register("Foldcut", channels=rules.rearrange(lambda c, dimension=1: c // 2))
class Foldcut(nn.Module):
    """Adds the two halves of the channels (YOLOv7); (B, C, H, W) to (B, C/2, H, W)."""

    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        _require_channels(dimension, "Foldcut folds")

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a + b


@register("Chuncat", channels=rules.concat)
class Chuncat(nn.Module):
    """Joins the first halves of all maps, then their second halves (YOLOv7); list of (B, Cᵢ, H, W) to (B, ΣCᵢ, H, W)."""

    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        _require_channels(dimension, "Chuncat joins")

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        first, second = zip(*(x.chunk(2, 1) for x in maps))
        return torch.cat((*first, *second), 1)


def _require_channels(dimension: int, what: str) -> None:
    """Raises ValueError unless the dimension argument of a published row is 1, the channels."""
    if dimension != 1:
        raise ValueError(f"{what} channels, dimension 1, not {dimension}")
