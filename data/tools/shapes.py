"""The embedded data set: textured shapes on textured, noisy backgrounds, drawn in seconds, bit for bit the same, without a download.

Shapes overlap and are cut by the borders; a label's box is the extent of what can be seen of its shape. Run
``python -m data.shapes [FOLDER]`` to draw it into another folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from data.tools.embedded import ensure_drawn
from utils.cli.parser import OneLineParser
from utils.cli.script import run_script

NAMES = ("disc", "square", "triangle", "star", "cross", "ring")
COUNTS = {"train": 200, "val": 50}
VERSION = 2
MIN_PX, MAX_PX = 8, 160
MIN_VISIBLE = 0.5  # of a shape's area, of every labelled shape


class Placed(NamedTuple):
    """A drawn shape."""

    label: int
    area: float  # px, with what lies outside the image
    outline: np.ndarray  # (k, 2) corners in px, with those outside the image
    angle: float  # radians by which the outline is turned


class Scene(NamedTuple):
    """One image and what is on it."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    placed: list[Placed]
    owner: np.ndarray  # (H, W) int64 number of the shape that each px shows, -1 for none


def ensure_shapes(folder: Path) -> Path:
    """Draws the data set into ``folder`` unless it exists; the folder gets its name when it is complete."""
    return ensure_drawn(folder, generate, version=VERSION)


def generate(folder: Path) -> None:
    """Writes images, YOLO labels and COCO annotations of both splits below ``folder``."""
    for split in COUNTS:
        images = []
        for scene, label_file in write_scenes(folder, split):
            image, classes, boxes = visible_boxes(scene)
            label_file.write_text(_yolo_rows(classes, boxes, image.shape[:2]))
            images.append((f"{label_file.stem}.jpg", image.shape[:2], classes, boxes))
        write_annotations(folder, f"instances_{split}", _coco(images))


def write_scenes(folder: Path, split: str) -> Iterator[tuple[Scene, Path]]:
    """Writes the images of a split below ``folder``, and gives each scene with the label file that the caller writes."""
    for kind in ("images", "labels"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
    for i in range(COUNTS[split]):
        scene = draw_scene(np.random.default_rng([VERSION, [*COUNTS].index(split), i]))
        name = f"{split}_{i:04d}"
        write_jpeg(folder / "images" / split / f"{name}.jpg", scene.image)
        yield scene, folder / "labels" / split / f"{name}.txt"


def write_jpeg(path: Path, image: np.ndarray) -> None:
    """An image (H, W, 3) uint8 RGB as a file."""
    cv2.imencode(".jpg", image[:, :, ::-1], (cv2.IMWRITE_JPEG_QUALITY, 92))[1].tofile(path)


def write_annotations(folder: Path, name: str, content: Any) -> None:
    """A COCO file below ``folder``."""
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))


def draw_image(rng: np.random.Generator) -> tuple[np.ndarray, list[int], list[tuple[int, int, int, int]]]:
    """One image: (H, W, 3) uint8 RGB, class numbers, and xyxy boxes in px of what is visible."""
    return visible_boxes(draw_scene(rng))


def visible_boxes(scene: Scene) -> tuple[np.ndarray, list[int], list[tuple[int, int, int, int]]]:
    """The image of a scene, class numbers, and xyxy boxes in px of what is visible."""
    return scene.image, [p.label for p in scene.placed], [extent(scene.owner == i) for i in range(len(scene.placed))]


def draw_scene(rng: np.random.Generator) -> Scene:
    """One image and its shapes."""
    h, w = (int(v) for v in rng.integers(240, 385, 2))
    image = _background(rng, h, w)
    owner = np.full((h, w), -1, np.int64)
    placed: list[Placed] = []
    for _ in range(int(rng.integers(5, 12))):
        label = int(rng.integers(len(NAMES)))
        least = MIN_PX if rng.random() < 0.2 else 3 * MIN_PX
        size = float(np.exp(rng.uniform(math.log(least), math.log(MAX_PX))))
        coverage, window, shape = _coverage(rng, label, size, rng.uniform(0, (w, h)), (h, w))
        texture = _texture(rng, label, size, coverage.shape)
        if not _fits(coverage > 0.5, shape.area, owner, window, placed):
            continue
        image[window] += coverage[:, :, None] * (texture - image[window])
        owner[window][coverage > 0.5] = len(placed)
        placed.append(shape)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(2, 10))
    return Scene(np.clip(image, 0, 255).astype(np.uint8), placed, owner)


def _fits(mask: np.ndarray, area: float, owner: np.ndarray, window: tuple[slice, slice], placed: list[Placed]) -> bool:
    """Whether a new shape with ``mask`` in ``window`` is visible enough and leaves enough of the shapes below it."""
    if mask.sum() < max(MIN_VISIBLE * area, MIN_PX**2 / 4):
        return False
    if min(np.ptp(np.flatnonzero(mask.any(0))), np.ptp(np.flatnonzero(mask.any(1)))) < MIN_PX - 2:
        return False
    left = np.bincount(owner[owner >= 0], minlength=len(placed))
    below = owner[window][mask]
    left -= np.bincount(below[below >= 0], minlength=len(placed))
    return all(left[i] >= MIN_VISIBLE * p.area for i, p in enumerate(placed))


def _coverage(
    rng: np.random.Generator, label: int, size: float, centre: np.ndarray, hw: tuple[int, int]
) -> tuple[np.ndarray, tuple[slice, slice], Placed]:
    """A shape at a random angle: how much of each pixel of a window it covers, (h, w) float32; the window; the shape."""
    outline, hole = _outline(NAMES[label])
    angle = rng.uniform(0, 2 * math.pi)
    stretch = np.array((1.0, rng.uniform(0.75, 1.0)))
    rotation = np.array(((math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))))
    half = math.ceil(size / 2) + 2
    left, top = (int(c) - half for c in centre)
    canvas = np.zeros((2 * half, 2 * half), np.uint8)

    def in_image(points: np.ndarray) -> np.ndarray:
        return (points * stretch) @ rotation.T * (size / 2) + centre

    for points, value in ((outline, 255), (hole, 0)):
        if points is not None:
            px = in_image(points) - (left, top)
            cv2.fillPoly(canvas, [np.round(px * 16).astype(np.int32)], value, cv2.LINE_AA, 4)
    window = slice(max(top, 0), min(top + 2 * half, hw[0])), slice(max(left, 0), min(left + 2 * half, hw[1]))
    inside = canvas[window[0].start - top : window[0].stop - top, window[1].start - left : window[1].stop - left]
    shape = Placed(label, float(canvas.sum()) / 255, in_image(outline), float(angle))
    return inside.astype(np.float32) / 255, window, shape


def _outline(name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Corner points within the unit circle, and those of a hole."""

    def ring(count: int, radius: float, start: float = 0.0) -> np.ndarray:
        angles = np.arange(count) * (2 * math.pi / count) + start
        return radius * np.stack((np.cos(angles), np.sin(angles)), 1)

    if name == "disc":
        return ring(64, 1.0), None
    if name == "ring":
        return ring(64, 1.0), ring(64, 0.55)
    if name == "square":
        return ring(4, 1.0, math.pi / 4), None
    if name == "triangle":
        return ring(3, 1.0), None
    if name == "star":
        return np.stack((ring(5, 1.0), ring(5, 0.42, math.pi / 5)), 1).reshape(-1, 2), None
    t = 0.3
    plus = ((-t, -1), (t, -1), (t, -t), (1, -t), (1, t), (t, t), (t, 1), (-t, 1), (-t, t), (-1, t), (-1, -t), (-t, -t))
    return np.array(plus) * 0.95, None


def _texture(rng: np.random.Generator, label: int, size: float, hw: tuple[int, ...]) -> np.ndarray:
    """(h, w, 3) float32: two colours of the class's hue in stripes, checks, dots or plain, always with some noise."""
    y, x = np.mgrid[: hw[0], : hw[1]].astype(np.float32)
    angle, period = rng.uniform(0, math.pi), max(3.0, size * rng.uniform(0.12, 0.3))
    u = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
    v = (y * math.cos(angle) - x * math.sin(angle)) * (2 * math.pi / period)
    pattern = (np.sin(u), np.sin(u) * np.sin(v), np.minimum(np.sin(u), np.sin(v)), np.zeros_like(u))[int(rng.integers(4))]
    blend = (np.clip(pattern * 2, -1, 1) * 0.5 + 0.5)[:, :, None]
    hue = (label / len(NAMES) * 180 + rng.normal(0, 9)) % 180
    light = _rgb(hue, rng.uniform(110, 220), rng.uniform(190, 255))
    dark = _rgb(hue, rng.uniform(140, 255), rng.uniform(90, 160))
    return dark + (light - dark) * blend + rng.standard_normal((*hw, 1), dtype=np.float32) * 6


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """One colour as (3,) float32, from OpenCV's ranges (hue to 180, the others to 255)."""
    pixel = np.array([[[hue, saturation, value]]], np.uint8)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)


def _background(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """(H, W, 3) float32: a dull colour, clouds of three sizes, and a gradient."""
    base = _rgb(rng.uniform(0, 180), rng.uniform(0, 70), rng.uniform(60, 190))
    image = np.broadcast_to(base, (h, w, 3)).astype(np.float32)
    for cells, strength in ((3, 30.0), (9, 18.0), (40, 12.0)):
        grid = rng.normal(0, strength, (cells, cells, 1)) + rng.normal(0, strength / 4, (cells, cells, 3))
        image = image + cv2.resize(grid.astype(np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
    slope = np.linspace(-1, 1, w, dtype=np.float32)[None, :, None] * rng.uniform(-25, 25)
    return image + slope


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """xyxy px of the true pixels, the far edges exclusive."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _yolo_rows(classes: list[int], boxes: list[tuple[int, int, int, int]], hw: tuple[int, int]) -> str:
    h, w = hw
    rows = [
        f"{c} {(x1 + x2) / 2 / w:.6f} {(y1 + y2) / 2 / h:.6f} {(x2 - x1) / w:.6f} {(y2 - y1) / h:.6f}\n"
        for c, (x1, y1, x2, y2) in zip(classes, boxes)
    ]
    return "".join(rows)


def _coco(entries: list[tuple[str, tuple[int, int], list[int], list[tuple[int, int, int, int]]]]) -> dict[str, list[dict[str, Any]]]:
    """The COCO form of all images of a split; ids from 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, (h, w), classes, boxes) in enumerate(entries, start=1):
        images.append({"id": image_id, "file_name": name, "width": w, "height": h})
        for c, (x1, y1, x2, y2) in zip(classes, boxes):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": c + 1, "bbox": [x1, y1, x2 - x1, y2 - y1],
                 "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            )  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": [{"id": i + 1, "name": n} for i, n in enumerate(NAMES)]}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = OneLineParser(prog="python -m data.shapes", description="Draws the embedded data set.")
    default = Path(__file__).resolve().parents[1] / "shapes"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="folder to write (default: data/shapes)")
    folder = parser.parse_args(argv).folder
    return run_script("data.shapes", lambda: print(f"shapes data set: {ensure_shapes(folder)}"))
