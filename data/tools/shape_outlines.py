"""The embedded data set for segmentation: the scenes of data/shapes with the outlines of what can be seen of each shape.

Label files have one polygon an object, with bridges to holes and to pieces that another shape has cut off; the COCO files have exact masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.tools.embedded import ensure_drawn
from data.tools.shapes import COUNTS, NAMES, VERSION, write_annotations, write_scenes
from utils.masks.outlines import joined, rings_of
from utils.masks.packed import pack
from utils.masks.rle import encode_packed


def ensure_shape_outlines(folder: Path) -> Path:
    """Draws the data set into ``folder`` unless it exists; the folder gets its name when it is complete."""
    return ensure_drawn(folder, generate, version=VERSION)


def generate(folder: Path) -> None:
    """Writes images, YOLO labels and COCO annotations of both splits below ``folder``."""
    for split in COUNTS:
        content: dict[str, list[dict[str, Any]]] = {
            "images": [], "annotations": [], "categories": [{"id": i + 1, "name": n} for i, n in enumerate(NAMES)],
        }  # fmt: skip
        for scene, label_file in write_scenes(folder, split):
            classes = [shape.label for shape in scene.placed]
            masks = scene.owner[None] == np.arange(len(classes))[:, None, None]
            label_file.write_text(_yolo_rows(classes, masks))
            _add_to_coco(content, f"{label_file.stem}.jpg", classes, masks)
        write_annotations(folder, f"instances_{split}", content)


def _yolo_rows(classes: list[int], masks: np.ndarray) -> str:
    h, w = masks.shape[1:]
    polygons = [(joined(rings_of(mask.astype(np.uint8))) / (w, h)).ravel() for mask in masks]
    return "".join(f"{c} {' '.join(f'{v:.5f}' for v in polygon)}\n" for c, polygon in zip(classes, polygons))


def _add_to_coco(content: dict[str, list[dict[str, Any]]], name: str, classes: list[int], masks: np.ndarray) -> None:
    """An image and its objects; ids from 1."""
    h, w = masks.shape[1:]
    image_id = len(content["images"]) + 1
    content["images"].append({"id": image_id, "file_name": name, "width": w, "height": h})
    for c, mask, code in zip(classes, masks, encode_packed(pack(masks), w)):
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        x, y = int(columns[0]), int(rows[0])
        content["annotations"].append(
            {"id": len(content["annotations"]) + 1, "image_id": image_id, "category_id": c + 1, "iscrowd": 0, "area": int(mask.sum()),
             "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
             "segmentation": {"size": [h, w], "counts": code["counts"].decode()}}
        )  # fmt: skip
