"""YOLO label files to a COCO instances JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset_spec import load_dataset_spec
from data.labels.checks import check_classes
from data.labels.files import list_images
from data.labels.problems import Problem
from data.labels.source import split_labels
from data.labels.table import LabelTable
from data.tools.writing import refuse_existing, write_text
from utils.errors import UserError
from utils.metrics.coco_eval import category_ids_of
from utils.metrics.coco_file import number_images


def yolo_to_coco(data: str, out: Path, *, split: str = "val", exist_ok: bool = False) -> list[Problem]:
    """Writes the labels of a split as an instances JSON.

    Images whose name is a number get it as their id, if all are; else they are counted from 1. Categories have COCO's ids if the classes
    are COCO's 80, else the class numbers.

    Args:
        data: dataset file.
        out: JSON to write.
        split: ``train``, ``val`` or ``test``.
        exist_ok: write over a file that is there.

    Returns:
        What was left out.

    Raises:
        UserError: the data set cannot be read, or the file exists already or cannot be written.
    """
    if out.is_dir() or out.suffix.lower() != ".json":
        raise UserError(f"--out {out}: is the JSON file to write, such as {out.with_suffix('') / f'instances_{split}.json'}")
    spec = load_dataset_spec(data, need=(split,))
    files = list_images(spec.sources(split))
    table, remarks = split_labels(spec, split, files, progress=sys.stderr.isatty())
    refuse_existing([out], exist_ok=exist_ok)
    table = check_classes(table, files, spec.names, spec.yaml_path)
    content = _coco_content(table, files, spec.names)
    write_text(out, json.dumps(content))
    print(*remarks, sep="\n", end="\n" if remarks else "")
    print(f"{len(content['images'])} images, {len(content['annotations'])} objects of {len(spec.names)} classes in {out}")
    return list(table.problems)


def _coco_content(table: LabelTable, files: Sequence[str], names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The JSON's ``images``, ``annotations`` and ``categories``, without unusable images."""
    base = os.path.commonpath([os.path.dirname(f) for f in files])
    categories = category_ids_of(names)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, (image_id, file) in enumerate(zip(number_images(files), files)):
        h, w = (int(v) for v in table.shapes_hw[i])
        if not h:
            continue
        images.append({"id": image_id, "file_name": os.path.relpath(file, base).replace(os.sep, "/"), "width": w, "height": h})
        part = slice(table.starts[i], table.starts[i + 1])
        polygons = table.instances(i, hw=(h, w)).polygons()
        for label, box, polygon in zip(table.classes[part], table.boxes_cxcywh[part].astype(np.float64), polygons):
            cx, cy, bw, bh = (box * (w, h, w, h)).tolist()
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": categories[int(label)],
                 "bbox": [cx - bw / 2, cy - bh / 2, bw, bh], "area": bw * bh, "iscrowd": 0,
                 "segmentation": [polygon.astype(np.float64).ravel().tolist()] if len(polygon) else []}
            )  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in zip(categories, names)]}
