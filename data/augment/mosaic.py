"""Images placed on a canvas and rendered under a random transform: four for a mosaic, one otherwise.

When the transform only zooms and moves, the default of every hyp file, each tile is resized straight into the output: the canvas, four
times its area, is never drawn. Tile borders are then rounded to whole pixels, and labels with them, so that they fit exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from data.augment.affine import MIN_AREA, MIN_AREA_POLYGON, Transform, random_transform, still_visible, warp_image, warp_instances
from data.augment.copy_paste import copy_paste
from data.augment.hyp import AugmentHyp
from data.images.pixels import OPENCV_CHANNELS, fill_of, resized
from utils.instances import Instances, concatenate


class Tile(NamedTuple):
    """One image on a canvas."""

    image: np.ndarray  # (h, w, C), never changed: it may be cached
    instances: Instances  # in px of the image
    x: int  # position of its upper left corner on the canvas; may be outside
    y: int


class Scene(NamedTuple):
    """Tiles on a canvas; what lies outside the canvas is not rendered."""

    tiles: tuple[Tile, ...]
    hw: tuple[int, int]


def mosaic_scene(images: Sequence[tuple[np.ndarray, Instances]], size: int, rng: np.random.Generator) -> Scene:
    """Four images about a common corner on a canvas of twice the size; the corner is uniform in its middle half (Bochkovskiy et al.,
    arXiv 2004.10934).

    Args:
        images: four images of at most ``size`` px a side, with their objects.
        size: side of the output in px.
        rng: the sample's generator.
    """
    cx, cy = (int(v) for v in rng.uniform(size * 0.5, size * 1.5, 2))
    tiles = []
    for position, (image, instances) in enumerate(images):
        h, w = image.shape[:2]
        tiles.append(Tile(image, instances, cx if position % 2 else cx - w, cy if position // 2 else cy - h))
    return Scene(tuple(tiles), (2 * size, 2 * size))


def single_scene(image: np.ndarray, instances: Instances, hw: tuple[int, int]) -> Scene:
    """One image in the middle of a canvas of ``hw`` px."""
    h, w = image.shape[:2]
    return Scene((Tile(image, instances, (hw[1] - w) // 2, (hw[0] - h) // 2),), hw)


def render_view(
    scene: Scene,
    out_hw: tuple[int, int],
    hyp: AugmentHyp,
    rng: np.random.Generator,
    *,
    flip_idx: Sequence[int] | None = None,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, Instances]:
    """The scene under a random transform: a new (H, W, C) image and the objects that are still visible in it.

    Copies are pasted in mosaics only; ``flip_idx`` is for their keypoints. The image is drawn in ``out`` where that saves a copy.
    """
    transform = random_transform(scene.hw, out_hw, hyp, rng)
    paste = hyp.copy_paste if len(scene.tiles) > 1 and any(len(t.instances.points) for t in scene.tiles) else 0.0
    if transform.is_axis_aligned and not paste:
        image, before, after = resize_tiles(scene, transform, out_hw, out=out)
    else:
        image, before, after = warp_canvas(scene, transform, out_hw, paste, rng, flip_idx=flip_idx)
    polygonal = after.counts > 0
    zoomed = before.boxes_xyxy * np.float32(transform.gain)
    visible = still_visible(zoomed, after.boxes_xyxy, min_area=np.where(polygonal, MIN_AREA_POLYGON, MIN_AREA))
    return image, after.select(visible)


def warp_canvas(
    scene: Scene,
    transform: Transform,
    out_hw: tuple[int, int],
    paste: float,
    rng: np.random.Generator,
    *,
    flip_idx: Sequence[int] | None = None,
) -> tuple[np.ndarray, Instances, Instances]:
    """Renders through a canvas, on which copies are pasted: the image, and the objects before and after the warp."""
    image = _blank(scene, scene.hw)
    for tile in scene.tiles:
        _paste(image, tile.image, tile.x, tile.y)
    before = concatenate([t.instances.shifted(t.x, t.y).cut(scene.hw) for t in scene.tiles])
    image, before = copy_paste(image, before, paste, rng, flip_idx=flip_idx)
    return warp_image(image, transform.matrix, out_hw), before, warp_instances(before, transform.matrix, out_hw)


def resize_tiles(
    scene: Scene, transform: Transform, out_hw: tuple[int, int], *, out: np.ndarray | None = None
) -> tuple[np.ndarray, Instances, Instances]:
    """Renders a transform that only zooms and moves without a canvas: each tile's visible part is resized into its place.

    The image is ``out`` if that is given.
    """
    m = transform.matrix
    image = _blank(scene, out_hw, out)
    before, after = [], []
    for tile in scene.tiles:
        h, w = tile.image.shape[:2]
        x = _Span.of(tile.x, w, scene.hw[1], m[0, 0], m[0, 2], out_hw[1])
        y = _Span.of(tile.y, h, scene.hw[0], m[1, 1], m[1, 2], out_hw[0])
        if x.target > 0 and y.target > 0:
            part = tile.image[y.start : y.start + y.length, x.start : x.start + x.length]
            _paste_resized(image, part, (x.target, y.target), x.place, y.place)
        before.append(tile.instances.shifted(tile.x, tile.y).cut(scene.hw))
        shift = (x.place - x.scale * (tile.x + x.start), y.place - y.scale * (tile.y + y.start))
        after.append(before[-1].scaled(x.scale, y.scale).shifted(*shift))
    return image, concatenate(before), concatenate(after).clipped(out_hw)


class _Span(NamedTuple):
    """One axis of a tile: ``length`` px from ``start`` become ``target`` px at ``place`` of the output."""

    start: int
    length: int
    target: int
    place: int
    scale: float

    @staticmethod
    def of(offset: int, size: int, canvas: int, zoom: float, shift: float, out: int) -> _Span:
        """The part of a tile (at ``offset`` of a canvas) that the output shows under ``x -> zoom * x + shift``."""
        low = max(0, -offset, int(np.floor(-shift / zoom - offset)))
        high = min(size, canvas - offset, int(np.ceil((out - shift) / zoom - offset)))
        if high <= low:
            return _Span(0, 0, 0, round(zoom * offset + shift), zoom)
        place, end = round(zoom * (low + offset) + shift), round(zoom * (high + offset) + shift)
        scale = (end - place) / (high - low) if end > place else zoom
        return _Span(low, high - low, end - place, place, scale)


def _blank(scene: Scene, hw: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
    first = scene.tiles[0].image
    image = np.empty((*hw, first.shape[2]), first.dtype) if out is None else out
    image[:] = fill_of(first.dtype)
    return image


def _paste(image: np.ndarray, tile: np.ndarray, x: int, y: int) -> None:
    """Copies a tile into the image at (x, y), which may lie outside."""
    (height, width), (h, w) = image.shape[:2], tile.shape[:2]
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if x2 > x1 and y2 > y1:
        image[y1:y2, x1:x2] = tile[y1 - y : y2 - y, x1 - x : x2 - x]


def _paste_resized(image: np.ndarray, tile: np.ndarray, size_wh: tuple[int, int], x: int, y: int) -> None:
    """Copies a tile at another size into the image at (x, y); in one go if OpenCV can write there."""
    place = image[max(y, 0) : y + size_wh[1], max(x, 0) : x + size_wh[0]]
    if image.shape[2] <= OPENCV_CHANNELS and place.shape[:2] == size_wh[::-1]:
        cv2.resize(tile, size_wh, dst=place, interpolation=cv2.INTER_LINEAR)
    else:
        _paste(image, resized(tile, size_wh), x, y)
