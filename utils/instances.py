"""The objects of one image as flat arrays (classes, boxes, polygons where labels have them), and the geometry that moves them.

Polygons lie one after another in ``points``; ``counts`` says how many points each object has (0: only a box). So warping and clipping
never loop over objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Instances(NamedTuple):
    """Objects of one image."""

    classes: np.ndarray  # (n,) float32
    boxes_xyxy: np.ndarray  # (n, 4) float32, px of the image they belong to
    points: np.ndarray  # (p, 2) float32, px
    counts: np.ndarray  # (n,) int64, points per object

    @staticmethod
    def empty() -> Instances:
        return Instances(np.zeros(0, np.float32), np.zeros((0, 4), np.float32), np.zeros((0, 2), np.float32), np.zeros(0, np.int64))

    def select(self, keep: np.ndarray) -> Instances:
        """The objects where ``keep`` (n,) is true."""
        points = self.points[np.repeat(keep, self.counts)] if len(self.points) else self.points
        return Instances(self.classes[keep], self.boxes_xyxy[keep], points, self.counts[keep])

    def shifted(self, dx: float, dy: float) -> Instances:
        """Moved by (dx, dy) px."""
        points = self.points + np.array((dx, dy), np.float32) if len(self.points) else self.points
        return self._replace(boxes_xyxy=self.boxes_xyxy + np.array((dx, dy, dx, dy), np.float32), points=points)

    def scaled(self, sx: float, sy: float) -> Instances:
        """Coordinates multiplied by (sx, sy)."""
        points = self.points * np.array((sx, sy), np.float32) if len(self.points) else self.points
        return self._replace(boxes_xyxy=self.boxes_xyxy * np.array((sx, sy, sx, sy), np.float32), points=points)

    def mirrored(self, width: float) -> Instances:
        """Left and right exchanged in an image ``width`` px wide."""
        boxes = self.boxes_xyxy.copy()
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        points = self.points * np.array((-1, 1), np.float32) + np.array((width, 0), np.float32) if len(self.points) else self.points
        return self._replace(boxes_xyxy=boxes, points=points)

    def polygons(self) -> list[np.ndarray]:
        """The points of every object, (k, 2) each; empty for those that only have a box."""
        return np.split(self.points, np.cumsum(self.counts)[:-1]) if len(self.counts) else []


def concatenate(parts: Sequence[Instances]) -> Instances:
    """All objects of several images of one coordinate frame."""
    if not parts:
        return Instances.empty()
    return Instances(*(np.concatenate(arrays) for arrays in zip(*parts)))


def clip_boxes(boxes_xyxy: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Boxes (n, 4) cut at the borders of an image of ``hw`` px."""
    h, w = hw
    return np.clip(boxes_xyxy, 0, np.array((w, h, w, h), np.float32))


def clipped_polygon_boxes(points: np.ndarray, counts: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Tight boxes of polygons after cutting them at the image's borders.

    The corners of a cut polygon are the ends of its cut edges and those corners of the image that lie inside it, so no polygon has to
    be constructed. Edges are cut by the parametric rule of Liang and Barsky (1984).

    Args:
        points: (p, 2) all points, polygon after polygon.
        counts: (n,) points per polygon, at least 1 each.
        hw: Height and width of the image in px.

    Returns:
        (n, 4) xyxy px; all zeros where nothing is left inside.
    """
    n = len(counts)
    if n == 0:
        return np.zeros((0, 4), np.float32)
    h, w = hw
    starts = np.cumsum(counts) - counts
    follower = np.arange(1, len(points) + 1)
    follower[starts + counts - 1] = starts
    a, b = points.astype(np.float64), points[follower].astype(np.float64)
    t0, t1 = _edge_parameters(a, b, np.array((w, h), np.float64))
    inside = t0 <= t1  # (p,)
    ends = np.stack((a + (b - a) * t0[:, None], a + (b - a) * t1[:, None]), 1)  # (p, 2 ends, 2)
    low = np.minimum.reduceat(np.where(inside[:, None], ends.min(1), np.inf), starts)
    high = np.maximum.reduceat(np.where(inside[:, None], ends.max(1), -np.inf), starts)
    corners = np.array(((0, 0), (w, 0), (0, h), (w, h)), np.float64)
    held = _holds(corners, a, b, starts)[:, :, None]  # (n, 4, 1)
    low = np.minimum(low, np.where(held, corners, np.inf).min(1))
    high = np.maximum(high, np.where(held, corners, -np.inf).max(1))
    boxes = np.concatenate((low, high), 1)
    return np.where(np.isfinite(boxes).all(1)[:, None], boxes, 0.0).astype(np.float32)


def _edge_parameters(a: np.ndarray, b: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From where to where, in parts of its length, each edge a-b lies inside 0 … size; start above end where it does not."""
    delta = b - a
    with np.errstate(divide="ignore", invalid="ignore"):
        enter, leave = -a / delta, (size - a) / delta
    low, high = np.minimum(enter, leave), np.maximum(enter, leave)
    flat = delta == 0
    out = flat & ((a < 0) | (a > size))
    low = np.where(flat, np.where(out, np.inf, -np.inf), low)
    high = np.where(flat, np.where(out, -np.inf, np.inf), high)
    t0, t1 = np.maximum(low.max(1), 0.0), np.minimum(high.min(1), 1.0)
    outside = t0 > t1
    return np.where(outside, 1.0, t0), np.where(outside, 0.0, t1)


def _holds(corners: np.ndarray, a: np.ndarray, b: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Which corners (4, 2) lie inside which polygon, by the even-odd rule: (n, 4)."""
    x, y = corners[:, 0][None], corners[:, 1][None]  # (1, 4)
    ax, ay, bx, by = a[:, :1], a[:, 1:], b[:, :1], b[:, 1:]  # (p, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = (ay > y) != (by > y)
        right = x < (bx - ax) * (y - ay) / (by - ay) + ax
    return np.add.reduceat((crossing & right).astype(np.int64), starts, axis=0) % 2 == 1
