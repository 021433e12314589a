"""Rectangles of polygons: corners brought into order, and the smallest rotated rectangle about what an image shows of each polygon."""

from __future__ import annotations

import math

import numpy as np

CORNERS = 4
MOST_CORNERS = 12  # of a polygon that is taken as it is; a quadrangle that a mosaic and a view have cut has fewer
LOWEST_ANGLE = -math.pi / 4  # angles are in [−π/4, 3π/4), the range of the heads of YOLOv8


def ordered_corners(corners: np.ndarray) -> np.ndarray:
    """Four corners (4, 2) in the order of their outline: as they are where no sides cross, else by the direction from their centre.

    Of a quadrangle with an inward corner, that corner is moved onto a neighbour: what is left is its hull.
    """
    if not _is_convex(corners):
        offset = corners - corners.mean(0)
        corners = corners[np.argsort(np.arctan2(offset[:, 1], offset[:, 0]), kind="stable")]
    if not _is_convex(corners):
        import cv2

        hull = cv2.convexHull(corners.astype(np.float32)).reshape(-1, 2).astype(corners.dtype)
        corners = hull[np.minimum(np.arange(CORNERS), len(hull) - 1)]
    return corners


def _is_convex(corners: np.ndarray) -> bool:
    turn = _turns(corners[None])[0]
    return bool((turn >= 0).all() or (turn <= 0).all())


def _turns(polygons: np.ndarray) -> np.ndarray:
    """Twice the signed area (n, k) of each corner (n, k, 2) with its neighbours."""
    before, after = polygons - np.roll(polygons, 1, axis=1), np.roll(polygons, -1, axis=1) - polygons
    return before[..., 0] * after[..., 1] - before[..., 1] * after[..., 0]


def rectangles_of_polygons(points: np.ndarray, counts: np.ndarray, hw: tuple[int, int] | None = None) -> np.ndarray:
    """The smallest rotated rectangles about polygons, or about what an image of ``hw`` px shows of them.

    One side of the smallest rectangle lies along a side of the convex polygon, so few directions have to be tried.

    Args:
        points: (p, 2) px, corners of all polygons, one after another.
        counts: (n,) corners per polygon, at least 1 each.
        hw: height and width of the image; None does not cut.

    Returns:
        (n, 5) float32 centre, size, angle: the longer side first, the angle in [−π/4, 3π/4). Zeros where nothing is left inside.
    """
    if not len(counts):
        return np.zeros((0, 5), np.float32)
    polygons = _few_corners(points.astype(np.float64), counts)  # (n, k, 2)
    sides = np.roll(polygons, -1, axis=1) - polygons
    seen = np.ones(polygons.shape[:2], bool)
    if hw is not None:
        sides = np.concatenate((sides, np.broadcast_to((1.0, 0.0), (len(counts), 1, 2))), axis=1)
        polygons, seen = _corners_inside(polygons, hw)
    return _smallest_rectangles(polygons, seen, sides)


def _few_corners(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Convex polygons (n, k, 2) of few corners, the shorter ones filled up with their last: those that are neither become rectangles."""
    place = np.minimum(np.arange(min(int(counts.max()), MOST_CORNERS)), np.maximum(counts, 1)[:, None] - 1)
    starts = np.cumsum(counts) - counts
    polygons = points[starts[:, None] + place]
    turn = _turns(polygons)
    scale = 1e-6 * np.ptp(polygons, axis=1).prod(1)[:, None]  # rounding of a straight line is no corner
    odd = (counts > MOST_CORNERS) | ~((turn >= -scale).all(1) | (turn <= scale).all(1))
    if odd.any():
        import cv2
    for i in np.flatnonzero(odd):  # outlines of other labels than corners; rare
        rectangle = cv2.boxPoints(cv2.minAreaRect(points[starts[i] : starts[i] + counts[i]].astype(np.float32)))
        polygons[i] = rectangle[np.minimum(np.arange(polygons.shape[1]), CORNERS - 1)]
    return polygons


def _corners_inside(polygons: np.ndarray, hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Corners (n, 2k + 4, 2) of what an image shows of convex polygons, in no order, and which of them exist.

    They are the ends of the cut sides (rule of Liang and Barsky, 1984) and the image's corners inside.
    """
    size = np.array(hw[::-1], np.float64)
    a, delta = polygons, np.roll(polygons, -1, axis=1) - polygons
    with np.errstate(divide="ignore", invalid="ignore"):
        first, last = -a / delta, (size - a) / delta
    flat, outside = delta == 0, (a < 0) | (a > size)
    low = np.where(flat, np.where(outside, np.inf, -np.inf), np.minimum(first, last)).max(-1).clip(min=0)
    high = np.where(flat, np.where(outside, -np.inf, np.inf), np.maximum(first, last)).min(-1).clip(max=1)
    cut = np.asarray(low <= high)
    low, high = (np.where(cut, t, 0.0)[..., None] for t in (low, high))
    corners = np.array(((0, 0), (1, 0), (1, 1), (0, 1))) * size
    away = corners[:, None] - a[:, None]  # (n, 4, k, 2)
    turn = delta[:, None, :, 0] * away[..., 1] - delta[:, None, :, 1] * away[..., 0]
    area = np.abs(_turns(polygons)).sum(1)[:, None] > 0
    held = np.asarray((turn >= 0).all(-1) | (turn <= 0).all(-1)) & area
    return (
        np.concatenate((a + delta * low, a + delta * high, np.broadcast_to(corners, (len(a), 4, 2))), axis=1),
        np.concatenate((cut, cut, held), axis=1),
    )


def _smallest_rectangles(points: np.ndarray, seen: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Of rectangles along any of the sides (n, d, 2) about the points (n, p, 2) that are ``seen``, the one of the least area."""
    length = np.linalg.norm(sides, axis=-1, keepdims=True)
    along = np.where(length > 0, sides / np.where(length > 0, length, 1), (1.0, 0.0))  # (n, d, 2)
    across = np.stack((-along[..., 1], along[..., 0]), axis=-1)
    low, high = [], []
    for axis in (along, across):
        at = points @ axis.transpose(0, 2, 1)  # (n, p, d)
        low.append(np.where(seen[..., None], at, np.inf).min(1))
        high.append(np.where(seen[..., None], at, -np.inf).max(1))
    rows, empty = np.arange(len(points)), np.logical_not(seen.any(1)).reshape(-1)
    lows, highs = (np.where(empty[:, None, None], 0.0, np.stack(ends, axis=-1)) for ends in (low, high))  # (n, d, 2)
    size = highs - lows
    best = size.prod(-1).argmin(1)
    middle, size, along, across = ((lows + highs)[rows, best] / 2, size[rows, best], along[rows, best], across[rows, best])
    centre = middle[:, :1] * along + middle[:, 1:] * across
    angle = np.arctan2(along[:, 1], along[:, 0])
    found = canonical(np.concatenate((centre, size, angle[:, None]), axis=1))
    return np.where(empty[:, None], 0.0, found).astype(np.float32)


def canonical(boxes_cxcywha: np.ndarray) -> np.ndarray:
    """The same boxes (n, 5) with the longer side first and the angle in [−π/4, 3π/4)."""
    w, h, angle = boxes_cxcywha[:, 2], boxes_cxcywha[:, 3], boxes_cxcywha[:, 4]
    angle = np.where(h > w, angle + math.pi / 2, angle)
    turned = (angle - LOWEST_ANGLE) % math.pi + LOWEST_ANGLE
    turned = np.where(turned >= LOWEST_ANGLE + math.pi, LOWEST_ANGLE, turned)  # rounding
    return np.concatenate((boxes_cxcywha[:, :2], np.maximum(w, h)[:, None], np.minimum(w, h)[:, None], turned[:, None]), axis=1)
