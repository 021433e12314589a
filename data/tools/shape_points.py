"""The embedded data set for pose estimation: the scenes of data/shapes, with the outermost corners of each shape as its keypoints.

The keypoints are the topmost, rightmost, lowest and leftmost corner of a shape's outline (of a disc: of the points that it is drawn with).
One that another shape hides is labelled as hidden, one outside the image not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.tools.embedded import ensure_drawn
from data.tools.shapes import COUNTS, NAMES, VERSION, Placed, Scene, extent, write_annotations, write_scenes

POINT_NAMES = ("top", "right", "bottom", "left")
SKELETON = ((0, 1), (1, 2), (2, 3), (3, 0))
NEAR_PX = 2  # a keypoint is visible where a px of its shape is so near
HIDDEN, VISIBLE = 1, 2


def ensure_shape_points(folder: Path) -> Path:
    """Draws the data set into ``folder`` unless it exists; the folder gets its name when it is complete."""
    return ensure_drawn(folder, generate, version=VERSION)


def generate(folder: Path) -> None:
    """Writes images, YOLO labels and COCO annotations of both splits below ``folder``."""
    for split in COUNTS:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id, (scene, label_file) in enumerate(write_scenes(folder, split), 1):
            h, w = scene.image.shape[:2]
            images.append({"id": image_id, "file_name": f"{label_file.stem}.jpg", "width": w, "height": h})
            objects = [(p, extent(scene.owner == k), keypoints_of(p, k, scene)) for k, p in enumerate(scene.placed)]
            rows = [_yolo_row(*found, hw=(h, w)) for found in objects]
            label_file.write_text("".join(rows))
            annotations += [_annotation(*found, image_id=image_id, number=len(annotations) + n) for n, found in enumerate(objects, 1)]
        described = {"keypoints": list(POINT_NAMES), "skeleton": [[a + 1, b + 1] for a, b in SKELETON]}  # COCO counts from 1
        categories = [{"id": c + 1, "name": name, **described} for c, name in enumerate(NAMES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_annotations(folder, f"person_keypoints_{split}", content)


def keypoints_of(placed: Placed, number: int, scene: Scene) -> np.ndarray:
    """(4, 3) of x, y in px and visibility; zeros for one outside the image."""
    x, y = placed.outline.T
    points = placed.outline[[y.argmin(), x.argmax(), y.argmax(), x.argmin()]]
    h, w = scene.owner.shape
    inside = ((points >= 0) & (points <= (w, h))).all(axis=1)
    found = np.zeros((len(points), 3))
    for k in np.flatnonzero(inside).tolist():
        column, row = (int(v) for v in points[k])
        near = scene.owner[max(row - NEAR_PX, 0) : row + NEAR_PX + 1, max(column - NEAR_PX, 0) : column + NEAR_PX + 1]
        found[k] = *points[k], VISIBLE if (near == number).any() else HIDDEN
    return found


def _yolo_row(placed: Placed, box: tuple[int, int, int, int], keypoints: np.ndarray, *, hw: tuple[int, int]) -> str:
    (h, w), (x1, y1, x2, y2) = hw, box
    values = [(x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h]
    points = [f"{x / w:.6f} {y / h:.6f} {int(visible)}" for x, y, visible in keypoints.tolist()]
    return " ".join((str(placed.label), *(f"{value:.6f}" for value in values), *points)) + "\n"


def _annotation(
    placed: Placed, box: tuple[int, int, int, int], keypoints: np.ndarray, *, image_id: int, number: int
) -> dict[str, Any]:  # fmt: skip
    x1, y1, x2, y2 = box
    points = [value for x, y, visible in keypoints.tolist() for value in (round(x, 3), round(y, 3), int(visible))]
    return {
        "id": number, "image_id": image_id, "category_id": placed.label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1), "iscrowd": 0, "keypoints": points, "num_keypoints": int((keypoints[:, 2] > 0).sum()),
    }  # fmt: skip
