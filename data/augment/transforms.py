"""What is done to one image and its objects: letterbox, geometric warp, flips, colour, copy-paste and mixup.

Every random function takes its generator, so that a sample's fate hangs on nothing else. Hyper-parameters have the names and meanings of
the YOLOv5, v8 and v9 families.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from data.images.pixels import blended, brightened, fill_of, in_channel_groups, resized
from utils.instances import Instances, clip_boxes, clipped_polygon_boxes, concatenate

MIN_SIDE_PX, MAX_ASPECT, MIN_AREA, MIN_AREA_POLYGON = 2.0, 100.0, 0.1, 0.01


class AugmentHyp(Protocol):
    """The hyper-parameters that augmentation reads."""

    @property
    def hsv_h(self) -> float: ...
    @property
    def hsv_s(self) -> float: ...
    @property
    def hsv_v(self) -> float: ...
    @property
    def degrees(self) -> float: ...
    @property
    def translate(self) -> float: ...
    @property
    def scale(self) -> float: ...
    @property
    def shear(self) -> float: ...
    @property
    def perspective(self) -> float: ...
    @property
    def flipud(self) -> float: ...
    @property
    def fliplr(self) -> float: ...
    @property
    def mosaic(self) -> float: ...
    @property
    def mixup(self) -> float: ...
    @property
    def copy_paste(self) -> float: ...


class LetterboxedImage(NamedTuple):
    """A letterboxed image: ``xy_out = xy_in * scale_xy + pad_xy``."""

    image: np.ndarray  # (H, W, C)
    scale_xy: tuple[float, float]
    pad_xy: tuple[int, int]  # px at the left and at the top


class Transform(NamedTuple):
    """A geometric transform from a canvas to the output."""

    matrix: np.ndarray  # (3, 3) float64, acts on (x, y, 1) px
    gain: float  # its zoom

    @property
    def is_axis_aligned(self) -> bool:
        """Whether it only zooms and moves."""
        m = self.matrix
        return bool(m[0, 1] == m[1, 0] == m[2, 0] == m[2, 1] == 0 and m[0, 0] > 0 and m[1, 1] > 0)


def letterbox(
    image: np.ndarray,
    new_shape: int | tuple[int, int],
    *,
    color: tuple[int, int, int] | None = None,
    auto: bool = True,
    scale_fill: bool = False,
    scaleup: bool = True,
    stride: int = 32,
    interpolation: int = cv2.INTER_LINEAR,
) -> LetterboxedImage:
    """Fits an image into a shape at its own aspect ratio and fills the rest.

    Args:
        image: (h, w, C).
        new_shape: Height and width in px, or one number for both.
        color: Of the border of an RGB image, in its own depth; grey 114 of 255 if not given, as for all others.
        auto: Pad only to the next multiple of ``stride`` in each direction.
        scale_fill: Stretch instead of padding (ignored with ``auto``).
        scaleup: Whether small images are enlarged.
        stride: In px.
        interpolation: OpenCV's constant.
    """
    h, w = image.shape[:2]
    new_h, new_w = (new_shape, new_shape) if isinstance(new_shape, int) else new_shape
    ratio = min(new_h / h, new_w / w)
    ratio = ratio if scaleup else min(ratio, 1.0)
    inner_w, inner_h = max(round(w * ratio), 1), max(round(h * ratio), 1)
    dw, dh = new_w - inner_w, new_h - inner_h
    if auto:
        dw, dh = dw % stride, dh % stride
    elif scale_fill:
        inner_w, inner_h, dw, dh = new_w, new_h, 0, 0
    if (w, h) != (inner_w, inner_h):
        image = resized(image, (inner_w, inner_h), interpolation=interpolation)
    left, top = dw // 2, dh // 2
    if dw or dh:
        padded = np.empty((inner_h + dh, inner_w + dw, image.shape[2]), image.dtype)
        padded[:] = color if color is not None and image.shape[2] == 3 else fill_of(image.dtype)
        padded[top : top + inner_h, left : left + inner_w] = image
        image = padded
    return LetterboxedImage(image, (inner_w / w, inner_h / h), (left, top))


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
    """Objects under a 3x3 transform, boxes cut at the borders of the output; tight about the polygon where there is one.

    Objects are not removed: what lies outside gets a box without area.
    """
    b = instances.boxes_xyxy
    corners = b[:, (0, 1, 2, 1, 2, 3, 0, 3)].reshape(-1, 2)
    corners = _warp_points(corners, matrix).reshape(-1, 4, 2)
    boxes = np.concatenate((corners.min(1), corners.max(1)), 1) if len(b) else b
    points = _warp_points(instances.points, matrix)
    return tightened(instances._replace(boxes_xyxy=boxes, points=points), out_hw)


def tightened(instances: Instances, hw: tuple[int, int]) -> Instances:
    """Boxes cut at the borders of an image; those of polygons made tight about what is left of the polygon."""
    boxes = clip_boxes(instances.boxes_xyxy, hw)
    polygonal = instances.counts > 0
    if polygonal.any():
        boxes[polygonal] = clipped_polygon_boxes(instances.points, instances.counts[polygonal], hw)
    return instances._replace(boxes_xyxy=boxes)


def still_visible(before_xyxy: np.ndarray, after_xyxy: np.ndarray, *, min_area: float = MIN_AREA) -> np.ndarray:
    """Which objects (n,) survive a warp: more than 2 px a side, an aspect ratio under 100, enough of their area left.

    Args:
        before_xyxy: (n, 4) boxes before the warp, already at its zoom.
        after_xyxy: (n, 4) boxes after it, cut at the borders.
        min_area: Least part of the area that must be left.
    """
    before, after = before_xyxy[:, 2:] - before_xyxy[:, :2], after_xyxy[:, 2:] - after_xyxy[:, :2]
    w, h = after[:, 0], after[:, 1]
    aspect = np.maximum(w / (h + 1e-16), h / (w + 1e-16))
    return (w > MIN_SIDE_PX) & (h > MIN_SIDE_PX) & (w * h / (before.prod(1) + 1e-16) > min_area) & (aspect < MAX_ASPECT)


def hsv(image: np.ndarray, hyp: AugmentHyp, rng: np.random.Generator) -> np.ndarray:
    """Hue, saturation and value each multiplied by 1 ± its gain at most.

    Hue and saturation are those of 8-bit RGB. All values of other images (one channel, more than three, 16 bits) are multiplied by
    value's factor, which is what it does to a grey RGB image.
    """
    gains = np.array((hyp.hsv_h, hyp.hsv_s, hyp.hsv_v))
    factors = rng.uniform(-1, 1, 3) * gains + 1
    if not gains.any():
        return image
    if image.shape[2] != 3 or image.dtype != np.uint8:
        return brightened(image, float(factors[2])) if hyp.hsv_v else image
    levels = np.arange(256) * factors[:, None]
    levels[0] %= 180
    tables = np.clip(levels, 0, 255).astype(np.uint8)
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    changed = [cv2.LUT(plane, table) for plane, table in zip(planes, tables)]
    return cv2.cvtColor(cv2.merge(changed), cv2.COLOR_HSV2RGB)


def flip(image: np.ndarray, instances: Instances, hyp: AugmentHyp, rng: np.random.Generator) -> tuple[np.ndarray, Instances]:
    """Upside down and left to right, each with its probability. Polygons are dropped: nothing after this reads them."""
    upside_down, mirrored = rng.random(2) < (hyp.flipud, hyp.fliplr)
    if not (upside_down or mirrored):
        return image, instances
    h, w = image.shape[:2]
    boxes = instances.boxes_xyxy.copy()
    if upside_down:
        boxes[:, [1, 3]] = h - boxes[:, [3, 1]]
    if mirrored:
        boxes[:, [0, 2]] = w - boxes[:, [2, 0]]
    axes = -1 if upside_down and mirrored else int(mirrored)
    image = in_channel_groups(lambda part: cv2.flip(part, axes), image)
    return image, Instances(instances.classes, boxes, np.zeros((0, 2), np.float32), np.zeros_like(instances.counts))


def copy_paste(image: np.ndarray, instances: Instances, probability: float, rng: np.random.Generator) -> tuple[np.ndarray, Instances]:
    """Pastes mirrored copies of objects with polygons where they hide less than 30 % of any other (Ghiasi et al., arXiv 2012.07177).

    Args:
        image: (H, W, C); not changed.
        instances: Its objects.
        probability: Part of the objects that is tried.
        rng: The sample's generator.
    """
    polygonal = np.flatnonzero(instances.counts > 0)
    tried = rng.permutation(polygonal)[: round(probability * len(polygonal))]
    if not len(tried):
        return image, instances
    chosen = np.zeros(len(instances.counts), bool)
    chosen[tried] = True
    copies = instances.select(chosen).mirrored(image.shape[1])
    kept = _uncovering(instances.boxes_xyxy, copies.boxes_xyxy)
    if not kept.any():
        return image, instances
    copies = copies.select(kept)
    outlines = [np.round(p).astype(np.int32) for p in copies.polygons()]
    mask = np.zeros(image.shape[:2], np.uint8)
    for outline in outlines:  # one by one: filled together, overlaps would be holes
        cv2.fillPoly(mask, [outline], 1)
    image = np.where(mask[:, :, None] > 0, image[:, ::-1], image)
    return image, concatenate((instances, copies))


def mixup(
    first: tuple[np.ndarray, Instances], second: tuple[np.ndarray, Instances], rng: np.random.Generator
) -> tuple[np.ndarray, Instances]:
    """Two images of one size blended, the objects of both (Zhang et al., arXiv 1710.09412), with a weight from Beta(32, 32)."""
    ratio = rng.beta(32.0, 32.0)
    return blended(first[0], second[0], ratio), concatenate((first[1], second[1]))


def _warp_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(p, 2) points under a 3x3 transform."""
    if not len(points):
        return points
    mapped = points @ matrix[:, :2].T + matrix[:, 2]
    return (mapped[:, :2] / np.maximum(mapped[:, 2:], 1e-6)).astype(np.float32)


def _uncovering(boxes_xyxy: np.ndarray, copies_xyxy: np.ndarray) -> np.ndarray:
    """Which copies (m,) may be pasted one after the other so that each covers less than 30 % of every box there by then."""
    everything = np.concatenate((boxes_xyxy, copies_xyxy))
    low = np.maximum(everything[None, :, :2], copies_xyxy[:, None, :2])
    high = np.minimum(everything[None, :, 2:], copies_xyxy[:, None, 2:])
    covered = (high - low).clip(0).prod(2) / ((everything[:, 2:] - everything[:, :2]).prod(1) + 1e-16)  # (m, n + m)
    n, kept = len(boxes_xyxy), np.zeros(len(copies_xyxy), bool)
    there = np.concatenate((np.ones(n, bool), kept))
    for i in range(len(copies_xyxy)):  # each choice depends on the ones before it
        kept[i] = there[n + i] = bool((covered[i, there] < 0.3).all())
    return kept
