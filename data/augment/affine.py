"""Random affine and perspective transforms of an image and its objects."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from data.augment.hyp import AugmentHyp
from data.images.pixels import fill_of, in_channel_groups
from utils.instances import Instances

MIN_SIDE_PX, MAX_ASPECT, MIN_AREA, MIN_AREA_POLYGON = 2.0, 100.0, 0.1, 0.01


class Transform(NamedTuple):
    """A geometric transform from a canvas to the output."""

    matrix: np.ndarray  # (3, 3) float64, acts on (x, y, 1) px
    gain: float  # its zoom

    @property
    def is_axis_aligned(self) -> bool:
        """Whether it only zooms and moves."""
        m = self.matrix
        return bool(m[0, 1] == m[1, 0] == m[2, 0] == m[2, 1] == 0 and m[0, 0] > 0 and m[1, 1] > 0)


def random_transform(canvas_hw: tuple[int, int], out_hw: tuple[int, int], hyp: AugmentHyp, rng: np.random.Generator) -> Transform:
    """Perspective, rotation, zoom, shear and shift about the canvas's centre, drawn as YOLOv5 draws them.

    The zoom is uniform in 1 ± ``scale``, the shift uniform in ± ``translate`` of the output, angles uniform in ± ``degrees`` and
    ± ``shear``, the two perspective terms in ± ``perspective``.
    """
    (h, w), (out_h, out_w) = canvas_hw, out_hw
    centre, perspective, shear, shift = (np.eye(3) for _ in range(4))
    centre[:2, 2] = -w / 2, -h / 2
    perspective[2, :2] = rng.uniform(-hyp.perspective, hyp.perspective, 2)
    angle = math.radians(rng.uniform(-hyp.degrees, hyp.degrees))
    gain = max(rng.uniform(1 - hyp.scale, 1 + hyp.scale), 1e-3)
    cos, sin = gain * math.cos(angle), gain * math.sin(angle)
    rotation = np.array(((cos, sin, 0), (-sin, cos, 0), (0, 0, 1)))
    shear[0, 1], shear[1, 0] = np.tan(np.radians(rng.uniform(-hyp.shear, hyp.shear, 2)))
    shift[:2, 2] = rng.uniform(0.5 - hyp.translate, 0.5 + hyp.translate, 2) * (out_w, out_h)
    return Transform(shift @ shear @ rotation @ perspective @ centre, gain)


def warp_image(image: np.ndarray, matrix: np.ndarray, out_hw: tuple[int, int]) -> np.ndarray:
    """The image under a 3x3 transform, bilinear, grey outside; (H, W, C) of ``out_hw``.

    Coordinates count from pixel corners, as boxes do; OpenCV counts from pixel centres, hence the half pixel.
    """
    half = np.array(((1, 0, 0.5), (0, 1, 0.5), (0, 0, 1)))
    m = np.linalg.inv(half) @ matrix @ half
    h, w = out_hw
    fill = (fill_of(image.dtype),) * 4
    if m[2, 0] or m[2, 1]:
        return in_channel_groups(lambda part: cv2.warpPerspective(part, m, (w, h), borderValue=fill), image)
    return in_channel_groups(lambda part: cv2.warpAffine(part, m[:2], (w, h), borderValue=fill), image)


def warp_instances(instances: Instances, matrix: np.ndarray, out_hw: tuple[int, int]) -> Instances:
    """Objects under a 3x3 transform, clipped to the output; boxes are tight about the polygon where there is one.

    Objects are not removed: what lies outside gets a box without area.
    """
    b = instances.boxes_xyxy
    corners = _warp_points(b[:, (0, 1, 2, 1, 2, 3, 0, 3)].reshape(-1, 2), matrix).reshape(-1, 4, 2)
    boxes = np.concatenate((corners.min(1), corners.max(1)), 1) if len(b) else b
    return instances.moved(boxes, lambda xy: _warp_points(xy, matrix)).clipped(out_hw)


def still_visible(before_xyxy: np.ndarray, after_xyxy: np.ndarray, *, min_area: float | np.ndarray = MIN_AREA) -> np.ndarray:
    """Which objects (n,) are kept after a warp: more than 2 px a side, an aspect ratio under 100, enough of their area left.

    Args:
        before_xyxy: (n, 4) boxes before the warp, already at its zoom.
        after_xyxy: (n, 4) boxes after it, cut at the borders.
        min_area: least part of the area that must be left.
    """
    before, after = before_xyxy[:, 2:] - before_xyxy[:, :2], after_xyxy[:, 2:] - after_xyxy[:, :2]
    w, h = after[:, 0], after[:, 1]
    aspect = np.maximum(w / (h + 1e-16), h / (w + 1e-16))
    return (w > MIN_SIDE_PX) & (h > MIN_SIDE_PX) & (w * h / (before.prod(1) + 1e-16) > min_area) & (aspect < MAX_ASPECT)


def _warp_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(…, 2) points under a 3x3 transform."""
    if not points.size:
        return points
    mapped = points @ matrix[:, :2].T + matrix[:, 2]
    return (mapped[..., :2] / np.maximum(mapped[..., 2:], 1e-6)).astype(np.float32)
