"""A data set in the layout of COCO's archives: image folders, annotations/instances_*.json, no label files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data.dataset_spec import HERE
from utils.metrics.coco_eval import COCO_CATEGORY_IDS

SIDE = 64


def coco_names() -> list[str]:
    """COCO's 80 names, from data/coco.yaml."""
    import yaml

    return list(yaml.safe_load((HERE / "coco.yaml").read_text())["names"].values())


def write_coco_layout(root: Path, *, train: int = 6, val: int = 4, classes: Sequence[int] = (0, 2, 79)) -> Path:
    """Writes noise images with two boxes, one of them with a polygon; the last image of a split has no box, the first a crowd region.

    Returns:
        A copy of coco.yaml in ``root``, with ``path: .``.
    """
    rng = np.random.default_rng(0)
    categories = [{"id": i, "name": n} for i, n in zip(COCO_CATEGORY_IDS, coco_names())]
    (root / "annotations").mkdir(parents=True)
    for split, count, first in (("train2017", train, 9), ("val2017", val, 400)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(first, first + count):
            name = f"{i:012d}.jpg"
            cv2.imwrite(str(root / split / name), rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
            images.append({"id": i, "file_name": name, "height": SIDE, "width": SIDE})
            for k in range(2 if i < first + count - 1 else 0):
                x, y, w, h = (float(v) for v in (*rng.integers(2, 30, 2), *rng.integers(8, 30, 2)))
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                category = COCO_CATEGORY_IDS[classes[(i + k) % len(classes)]]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i, "category_id": category, "bbox": [x, y, w, h], "area": w * h,
                     "iscrowd": 0, "segmentation": [corners] if k else [corners, corners]}
                )  # fmt: skip
        crowd = {"id": 1000, "image_id": first, "category_id": 1, "bbox": [0, 0, 60, 60], "area": 3600, "iscrowd": 1, "segmentation": {}}
        content = {"images": images, "annotations": [*annotations, crowd], "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    text = (HERE / "coco.yaml").read_text().replace("path: ../../datasets/coco", "path: .")
    (root / "coco.yaml").write_text(text)
    return root / "coco.yaml"


def edit_json(path: Path, change) -> None:
    """Rewrites a JSON file after ``change`` has modified its content."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
