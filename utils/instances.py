"""The objects of one image as flat arrays: classes, boxes, polygons, and keypoints where the data have them; and what moves them.

Polygons lie one after another in ``points``; ``counts`` says how many points each object has (0: only a box). So warping and clipping
never loop over objects. An object in pieces, or with holes, has several rings, filled by the even-odd rule: ``breaks`` marks where a
further one begins. Every method acts on every field; a field that is absent (None) stays absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Instances:
    """Objects of one image, in its px; coordinates count from pixel corners.

    Attributes:
        classes: (n,) float32.
        boxes_xyxy: (n, 4) float32.
        points: (p, 2) float32, the corners of all polygons, object after object.
        counts: (n,) int64, points per object.
        keypoints: (n, K, 3) float32 of x, y and visibility (0: not labelled or outside, 1: hidden, 2: visible), or None.
        breaks: (p,) bool, true at the first point of a ring that is not its object's first; None where every object has one.
    """

    classes: np.ndarray
    boxes_xyxy: np.ndarray
    points: np.ndarray
    counts: np.ndarray
    keypoints: np.ndarray | None = None
    breaks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.classes)

    @classmethod
    def empty(cls) -> Instances:
        """No objects, and no keypoints."""
        return cls(np.zeros(0, np.float32), np.zeros((0, 4), np.float32), np.zeros((0, 2), np.float32), np.zeros(0, np.int64))

    def replace(self, **fields: np.ndarray | None) -> Instances:
        """The same objects with some fields exchanged."""
        return dataclasses.replace(self, **fields)  # type: ignore[arg-type]

    def select(self, keep: np.ndarray) -> Instances:
        """The objects where ``keep`` (n,) is true."""
        keep_points = np.repeat(keep, self.counts) if len(self.points) else slice(None)
        keypoints = None if self.keypoints is None else self.keypoints[keep]
        breaks = None if self.breaks is None else self.breaks[keep_points]
        return Instances(self.classes[keep], self.boxes_xyxy[keep], self.points[keep_points], self.counts[keep], keypoints, breaks)

    def moved(self, boxes_xyxy: np.ndarray, move: Callable[[np.ndarray], np.ndarray]) -> Instances:
        """The objects under a transform: their new boxes, and ``move`` applied to the coordinates (…, 2) of polygons and keypoints."""
        points, keypoints = self.points, self.keypoints
        if len(points):
            points = move(points)
        if keypoints is not None:
            keypoints = np.concatenate((move(keypoints[..., :2]), keypoints[..., 2:]), axis=-1)
        return Instances(self.classes, boxes_xyxy, points, self.counts, keypoints, self.breaks)

    def shifted(self, dx: float, dy: float) -> Instances:
        """Moved by (dx, dy) px."""
        shift = np.array((dx, dy, dx, dy), np.float32)
        return self.moved(self.boxes_xyxy + shift, lambda xy: xy + shift[:2])

    def scaled(self, sx: float, sy: float) -> Instances:
        """Coordinates multiplied by (sx, sy)."""
        scale = np.array((sx, sy, sx, sy), np.float32)
        return self.moved(self.boxes_xyxy * scale, lambda xy: xy * scale[:2])

    def mirrored(self, width: float, *, flip_idx: Sequence[int] | None = None) -> Instances:
        """Left and right exchanged in an image ``width`` px wide.

        Args:
            width: in px.
            flip_idx: for each keypoint the index of its left-right counterpart (left eye: right eye); None: each is its own.
        """
        boxes = self.boxes_xyxy.copy()
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        mirrored = self.moved(boxes, lambda xy: xy * np.array((-1, 1), np.float32) + np.array((width, 0), np.float32))
        return mirrored._counterparts(flip_idx)

    def flipped(self, height: float, *, flip_idx: Sequence[int] | None = None) -> Instances:
        """Upside down in an image ``height`` px high: a reflection too, so ``flip_idx`` applies as in :meth:`mirrored`."""
        boxes = self.boxes_xyxy.copy()
        boxes[:, [1, 3]] = height - boxes[:, [3, 1]]
        flipped = self.moved(boxes, lambda xy: xy * np.array((1, -1), np.float32) + np.array((0, height), np.float32))
        return flipped._counterparts(flip_idx)

    def _counterparts(self, flip_idx: Sequence[int] | None) -> Instances:
        """With each keypoint in the place of its counterpart."""
        if self.keypoints is None or flip_idx is None:
            return self
        return self.replace(keypoints=self.keypoints[:, list(flip_idx)])

    def cut(self, hw: tuple[int, int]) -> Instances:
        """Boxes and polygons cut at the borders of an image of ``hw`` px; keypoints outside it get visibility 0.

        An object whose polygon lies outside gets a box without area.
        """
        boxes, keypoints = clip_boxes(self.boxes_xyxy, hw), self._keypoints_within(hw)
        if not len(self.points) or not ((self.points < 0) | (self.points > np.array(hw[::-1], np.float32))).any():
            return self.replace(boxes_xyxy=boxes, keypoints=keypoints)
        owner, first = np.repeat(np.arange(len(self.counts)), self.counts), self._ring_starts()
        ring = np.cumsum(first) - 1
        points, ring = cut_rings(self.points, ring, hw)
        owner = owner[first][ring]
        counts = np.bincount(owner, minlength=len(self.counts))
        breaks = np.concatenate(([False], (ring[1:] != ring[:-1]) & (owner[1:] == owner[:-1])))[: len(ring)]
        boxes[(self.counts > 0) & (counts == 0), 2:] = boxes[(self.counts > 0) & (counts == 0), :2]
        return Instances(self.classes, boxes, points, counts, keypoints, breaks if breaks.any() else None)

    def clipped(self, hw: tuple[int, int]) -> Instances:
        """Boxes cut at the borders of an image of ``hw`` px, tight about what is left inside where there is a polygon.

        Polygons keep their corners outside, so that their edges inside stay as they are; keypoints outside get visibility 0.
        """
        boxes = clip_boxes(self.boxes_xyxy, hw)
        has_polygon = self.counts > 0
        if has_polygon.any():
            boxes[has_polygon] = clipped_polygon_boxes(self.points, self.counts[has_polygon], hw, breaks=self.breaks)
        return self.replace(boxes_xyxy=boxes, keypoints=self._keypoints_within(hw))

    def polygons(self) -> list[np.ndarray]:
        """The points of every object, (k, 2) each, ring after ring; empty for those that only have a box."""
        return np.split(self.points, np.cumsum(self.counts)[:-1]) if len(self.counts) else []

    def outlines(self) -> list[list[np.ndarray]]:
        """The rings of every object, (k, 2) each; none of those that only have a box."""
        if not len(self.points):
            return [[] for _ in range(len(self.counts))]
        starts = np.flatnonzero(self._ring_starts())
        rings = np.split(self.points, starts[1:])
        of_object = np.searchsorted(starts, np.cumsum(self.counts)).tolist()
        return [rings[a:b] for a, b in zip([0, *of_object], of_object)]

    def _ring_starts(self) -> np.ndarray:
        """(p,) bool, the first point of every ring."""
        first = np.zeros(len(self.points), bool) if self.breaks is None else self.breaks.copy()
        first[(np.cumsum(self.counts) - self.counts)[self.counts > 0]] = True
        return first

    def _keypoints_within(self, hw: tuple[int, int]) -> np.ndarray | None:
        if self.keypoints is None:
            return None
        xy, visibility = self.keypoints[..., :2], self.keypoints[..., 2:]
        inside = ((xy >= 0) & (xy <= np.array(hw[::-1], np.float32))).all(-1, keepdims=True)
        return np.concatenate((xy, visibility * inside), axis=-1)


def concatenate(parts: Sequence[Instances]) -> Instances:
    """All objects of several images of one coordinate frame.

    Raises:
        ValueError: some parts with objects have keypoints and others have none.
    """
    if not parts:
        return Instances.empty()
    keypoints = [part.keypoints for part in parts if part.keypoints is not None]
    if keypoints and any(part.keypoints is None and len(part) for part in parts):
        raise ValueError("some objects have keypoints and others have none; all or none are expected")
    some_breaks = any(part.breaks is not None for part in parts)
    return Instances(
        np.concatenate([part.classes for part in parts]),
        np.concatenate([part.boxes_xyxy for part in parts]),
        np.concatenate([part.points for part in parts]),
        np.concatenate([part.counts for part in parts]),
        np.concatenate(keypoints) if keypoints else None,
        np.concatenate([np.zeros(len(p.points), bool) if p.breaks is None else p.breaks for p in parts]) if some_breaks else None,
    )


def clip_boxes(boxes_xyxy: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Boxes (n, 4) cut at the borders of an image of ``hw`` px."""
    h, w = hw
    return np.clip(boxes_xyxy, 0, np.array((w, h, w, h), np.float32))


def cut_rings(points: np.ndarray, ring: np.ndarray, hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rings cut at the borders of an image of ``hw`` px, one border after another (Sutherland and Hodgman, 1974), all at once.

    Args:
        points: (p, 2) float32 px, ring after ring.
        ring: (p,) which ring each point is of, ascending.
        hw: height and width of the image.

    Returns:
        Points and rings; a ring that lies outside has no point left. What connects several parts of a ring runs along the border.
    """
    for axis, limit, sign in ((0, 0.0, 1), (0, float(hw[1]), -1), (1, 0.0, 1), (1, float(hw[0]), -1)):
        inside = sign * (points[:, axis] - limit) >= 0
        if inside.all():
            continue
        index = np.arange(len(points))
        last = np.append(ring[1:] != ring[:-1], True)
        start = np.searchsorted(ring, ring)
        follower = np.where(last, start, index + 1)
        crosses = inside != inside[follower]
        a, b = points[crosses].astype(np.float64), points[follower[crosses]].astype(np.float64)
        part = ((limit - a[:, axis]) / (b[:, axis] - a[:, axis]))[:, None]
        met = a + (b - a) * part
        met[:, axis] = limit
        order = np.argsort(np.concatenate((2 * index[inside], 2 * index[crosses] + 1)), kind="stable")
        points = np.concatenate((points[inside], met.astype(np.float32)))[order]
        ring = np.concatenate((ring[inside], ring[crosses]))[order]
    return points, ring


def clipped_polygon_boxes(points: np.ndarray, counts: np.ndarray, hw: tuple[int, int], *, breaks: np.ndarray | None = None) -> np.ndarray:
    """Tight boxes of polygons after cutting them at the image's borders.

    The corners of a cut polygon are the ends of its cut edges and those corners of the image that lie inside it, so no polygon has to
    be constructed. Edges are cut by the parametric rule of Liang and Barsky (1984).

    Args:
        points: (p, 2) all points, polygon after polygon.
        counts: (n,) points per polygon, at least 1 each.
        hw: height and width of the image in px.
        breaks: (p,) bool, where a further ring of the same polygon begins.

    Returns:
        (n, 4) xyxy px; all zeros where nothing is left inside.
    """
    n = len(counts)
    if n == 0:
        return np.zeros((0, 4), np.float32)
    h, w = hw
    starts = np.cumsum(counts) - counts
    follower = np.arange(1, len(points) + 1)
    first = starts if breaks is None else np.union1d(starts, np.flatnonzero(breaks))
    follower[np.append(first[1:], len(points)) - 1] = first
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
    """Start and end, in parts of its length, of each edge a-b within 0 … size; start above end where it is outside."""
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
