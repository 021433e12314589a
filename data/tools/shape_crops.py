"""The embedded data set for classification: the shapes of the scenes of data/shapes cut out, a folder for each class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.tools.embedded import ensure_drawn
from data.tools.shapes import NAMES, VERSION, draw_image, write_jpeg

CROPS = {"train": 100, "val": 25}  # of each class
MARGIN = 0.25  # of the shape's longer side, on each side of it
LEAST_PX = 24  # longer side of a shape that is cut out


def ensure_shape_crops(folder: Path) -> Path:
    """Draws the data set into ``folder`` unless it exists; the folder gets its name when it is complete."""
    return ensure_drawn(folder, generate, version=VERSION)


def generate(folder: Path) -> None:
    """Writes ``<split>/<class>/<number>.jpg`` below ``folder``."""
    for number, (split, most) in enumerate(CROPS.items()):
        counts = dict.fromkeys(NAMES, 0)
        for name in NAMES:
            (folder / split / name).mkdir(parents=True)
        for name, crop in shapes_of_scenes(number):
            if counts[name] < most:
                write_jpeg(folder / split / name / f"{counts[name]:03d}.jpg", crop)
                counts[name] += 1
            if all(count >= most for count in counts.values()):
                break


def shapes_of_scenes(split: int) -> Iterator[tuple[str, np.ndarray]]:
    """Class and crop (h, w, 3) uint8 RGB of every large enough shape of the scenes of a split, without end.

    A crop is a square around the shape, moved into the image; what else lies there is seen too.
    """
    scene = 0
    while True:
        image, classes, boxes = draw_image(np.random.default_rng([VERSION, split, scene]))
        for label, (x1, y1, x2, y2) in zip(classes, boxes):
            side = round(max(x2 - x1, y2 - y1) * (1 + 2 * MARGIN))
            if max(x2 - x1, y2 - y1) >= LEAST_PX:
                yield NAMES[label], square_at(image, (x1 + x2) / 2, (y1 + y2) / 2, side)
        scene += 1


def square_at(image: np.ndarray, x: float, y: float, side: int) -> np.ndarray:
    """The part of an image (H, W, C) within a square about a point in px, moved into the image; smaller where it does not fit."""
    height, width = image.shape[:2]
    left, top = (min(max(round(at - side / 2), 0), max(most - side, 0)) for at, most in ((x, width), (y, height)))
    return image[top : top + side, left : left + side]
