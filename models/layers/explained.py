"""What a module shows of itself when it is asked, for figures: weights of channels, maps, regions and points.

A module says what it has by a method ``explain(x, query)``: the input that it got (1, C, H, W) and a place of interest to views of the
types below. Nothing calls it but explain.py and ``engine.explain``; a forward pass computes and keeps nothing for it.

Example:
    >>> class MyGate(nn.Module):
    ...     def forward(self, x):
    ...         return x * self.gate(x)
    ...     explain = explain_gate  # channel weights as bars, a spatial gate as a map, by the shape of ``self.gate(x)``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

MOST_HEADS = 4  # heads that are shown one by one; more are shown as their mean only


class Query(NamedTuple):
    """A place of a map, as fractions of its height and width in [0, 1]."""

    y: float
    x: float

    def cell(self, height: int, width: int) -> tuple[int, int]:
        """Row and column of the cell at this place of a map of so many rows and columns."""
        return min(int(self.y * height), height - 1), min(int(self.x * width), width - 1)

    def cell_number(self, height: int, width: int) -> int:
        """The same as one number, cells counted row by row."""
        row, column = self.cell(height, width)
        return row * width + column


@dataclass(frozen=True)
class ChannelWeights:
    """One number a channel, shown as sorted bars."""

    title: str
    values: Tensor  # (C,)


@dataclass(frozen=True)
class PlaneMap:
    """One number a cell, shown over the image.

    Attributes:
        title: what it is.
        values: (h, w), any resolution.
        at_query: whether it belongs to the place of interest, which is then marked.
        signed: whether numbers below zero mean the opposite.
        reach: height and width of the plane that the map covers, in those of the module's input: above 1 where the map is padded.
    """

    title: str
    values: Tensor
    at_query: bool = False
    signed: bool = False
    reach: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Regions:
    """Rectangles: the one that the place of interest lies in, and those that it attends to, the most important first.

    Attributes:
        title: what they are.
        own: (4,) xyxy, as fractions of the module's input.
        boxes: (K, 4) likewise.
        weights: (K,) what each is worth; they need not sum to 1.
    """

    title: str
    own: Tensor
    boxes: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Points:
    """Places that a module samples.

    Attributes:
        title: what they are.
        xy: (N, 2) as fractions of the module's input.
        weights: (N,) what each is worth for the place of interest, or None.
        origins_xy: (N, 2) where each point was before it was moved, or None.
    """

    title: str
    xy: Tensor
    weights: Tensor | None = None
    origins_xy: Tensor | None = None


View: TypeAlias = ChannelWeights | PlaneMap | Regions | Points


def explain_gate(self: Any, x: Tensor, query: Query) -> tuple[View, ...]:
    """``explain`` of a module whose ``gate(x)`` multiplies its input."""
    return gate_views(self.gate(x))


def gate_views(gate: Tensor, *, title: str = "") -> tuple[View, ...]:
    """A gate (1, C, 1, 1) as bars, (1, 1, H, W) as a map, and (1, C, H, W) as the means over pixels and over channels."""
    _, channels, height, width = gate.shape
    prefix = f"{title}: " if title else ""
    views: list[View] = []
    if channels > 1:
        views.append(ChannelWeights(f"{prefix}channel weights", gate[0].mean((1, 2))))
    if height * width > 1:
        views.append(PlaneMap(f"{prefix}spatial gate" + (", mean over channels" if channels > 1 else ""), gate[0].mean(0)))
    return tuple(views)


def query_weights(query: Tensor, key: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale · q kᵀ + bias) of one query: (heads, d), (heads, M, d) -> (heads, M), in float32 at least."""
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = scale * (key.to(wide) @ query.to(wide).unsqueeze(2)).squeeze(2)
    return (logits if bias is None else logits + bias).softmax(1)


def head_maps(weights: Tensor, hw: tuple[int, int], *, what: str = "attention of the query") -> tuple[View, ...]:
    """Weights of one query (heads, h w) as the map of their mean, and, of a few heads, one map each."""
    maps = weights.unflatten(1, hw)
    heads = len(maps)
    views = [PlaneMap(f"{what}" + (f", mean of {heads} heads" if heads > 1 else ""), maps.mean(0), at_query=True)]
    if 1 < heads <= MOST_HEADS:
        views += [PlaneMap(f"{what}, head {head}", one, at_query=True) for head, one in enumerate(maps)]
    return tuple(views)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """A map of one image (1, heads d, H, W) -> (heads, H W, d)."""
    return x[0].flatten(1).unflatten(0, (heads, -1)).transpose(1, 2)
