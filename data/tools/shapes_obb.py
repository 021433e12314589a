"""The embedded data set of oriented boxes: the scenes of data/shapes, with a box along each shape's own axes about what is seen of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from data.tools.embedded import ensure_drawn
from data.tools.shapes import COUNTS, VERSION, Scene, write_scenes


def ensure_shapes_obb(folder: Path) -> Path:
    """Draws the data set into ``folder`` unless it exists; the folder gets its name when it is complete."""
    return ensure_drawn(folder, generate, version=VERSION)


def generate(folder: Path) -> None:
    """Writes images and label rows of four corners of both splits below ``folder``."""
    for split in COUNTS:
        for scene, label_file in write_scenes(folder, split):
            label_file.write_text(label_rows(scene))


def label_rows(scene: Scene) -> str:
    """``class x1 y1 x2 y2 x3 y3 x4 y4`` of every shape, as fractions of the image."""
    size = np.array(scene.owner.shape[::-1])
    rows = []
    for i, shape in enumerate(scene.placed):
        corners = box_along(scene.owner == i, shape.angle) / size
        rows.append(" ".join((str(shape.label), *(f"{value:.6f}" for value in corners.ravel()))) + "\n")
    return "".join(rows)


def box_along(mask: np.ndarray, angle: float) -> np.ndarray:
    """Corners (4, 2) in px of the rectangle with a side along ``angle`` about the true pixels of a mask (H, W)."""
    y, x = np.nonzero(mask)
    axes = np.array(((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))))
    at = np.stack((x, y), axis=1) @ axes.T + axes.sum(1) / 2  # centres of the pixels along both axes
    (u0, v0), (u1, v1) = at.min(0) - 0.5, at.max(0) + 0.5
    return np.array(((u0, v0), (u1, v0), (u1, v1), (u0, v1))) @ axes
