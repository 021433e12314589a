"""YOLO label files to a COCO instances JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset_spec import DatasetSpec, load_dataset_spec
from data.labels.checks import check_classes
from data.labels.files import list_images
from data.labels.problems import OUT_OF_RANGE, Problem
from data.labels.source import split_labels
from data.labels.table import LabelTable
from data.tools.writing import refuse_existing, write_text
from tasks import DETECT, OBB, POSE
from tasks.keypoints import Keypoints
from tasks.obb import ROW_OF_CORNERS
from tasks.rows import LabelRow
from utils.errors import UserError
from utils.files import read_bounded
from utils.masks.coco_outlines import may_overlap
from utils.masks.outlines import cut_bridges, joined
from utils.masks.rle import Code, areas_of, encode_polygons
from utils.metrics.coco_eval import category_ids_of
from utils.metrics.coco_file import number_images
from utils.metrics.oks import BOX_TO_AREA
from utils.reading.limits import MAX_LABEL_BYTES


def yolo_to_coco(data: str, out: Path, *, split: str = "val", exist_ok: bool = False) -> list[Problem]:
    """Writes the labels of a split as an instances JSON.

    Images whose name is a number get it as their id, if all are; else they are counted from 1. Categories have COCO's ids if the classes
    are COCO's 80, else the class numbers. An outline in pieces is a list of polygons; one with holes, or pieces whose boxes meet, is a
    run-length code.

    Args:
        data: dataset file.
        out: JSON to write.
        split: ``train``, ``val`` or ``test``.
        exist_ok: write over a file that is there.

    Returns:
        What was left out.

    Raises:
        UserError: the data set cannot be read or has oriented boxes, or the file exists already or cannot be written.
    """
    if out.is_dir() or out.suffix.lower() != ".json":
        raise UserError(f"--out {out}: is the JSON file to write, such as {out.with_suffix('') / f'instances_{split}.json'}")
    spec = load_dataset_spec(data, need=(split,))
    files = list_images(spec.sources(split))
    task = POSE.for_labels(spec.label_settings, source=str(spec.yaml_path)) if spec.keypoints else DETECT
    table, remarks = split_labels(spec, split, files, task=task, progress=sys.stderr.isatty())
    _refuse_oriented(table)
    refuse_existing([out], exist_ok=exist_ok)
    table = check_classes(table, files, spec.names, spec.yaml_path)
    content = _coco_content(table, files, spec)
    write_text(out, json.dumps(content))
    print(*remarks, sep="\n", end="\n" if remarks else "")
    print(f"{len(content['images'])} images, {len(content['annotations'])} objects of {len(spec.names)} classes in {out}")
    return list(table.problems)


def _refuse_oriented(table: LabelTable) -> None:
    """Refuses rows of four corners of which some lie outside of their image, where no other outline has another number of corners."""
    corners = np.diff(table.point_starts)
    if not np.isin(corners, (0, 4)).all():
        return
    for problem in table.problems:
        if problem.kind == OUT_OF_RANGE and problem.row:
            row = read_bounded(problem.path, limit=MAX_LABEL_BYTES).decode("utf-8-sig").splitlines()[problem.row - 1].split()
            if len(row) == ROW_OF_CORNERS and isinstance(OBB.parse_row(row), LabelRow):
                place = f"{problem.path}:{problem.row}"
                raise UserError(f"{place}: a corner outside of the image, as oriented boxes have; COCO's JSON has no form for these")


def _coco_content(table: LabelTable, files: Sequence[str], spec: DatasetSpec) -> dict[str, list[dict[str, Any]]]:
    """The JSON's ``images``, ``annotations`` and ``categories``, without unusable images."""
    base = os.path.commonpath([os.path.dirname(f) for f in files])
    ids = category_ids_of(spec.names)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, (image_id, file) in enumerate(zip(number_images(files), files)):
        h, w = (int(v) for v in table.shapes_hw[i])
        if not h:
            continue
        images.append({"id": image_id, "file_name": os.path.relpath(file, base).replace(os.sep, "/"), "width": w, "height": h})
        for label, shape in zip(table.classes[table.starts[i] : table.starts[i + 1]], _shapes(table, i, (h, w))):
            head = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[int(label)]}
            annotations.append({**head, **shape, "iscrowd": 0})
    points = _described(spec.keypoints) if table.keypoints is not None and spec.keypoints else {}
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n, **points} for i, n in zip(ids, spec.names)]}


def _shapes(table: LabelTable, image: int, hw: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Box, outline, area and keypoints of each object of an image, as annotations have them.

    The area is the one that validation takes without a JSON: of the outline's mask, and without an outline the box's, or as much of it as
    an object with keypoints covers.
    """
    part, (h, w) = slice(table.starts[image], table.starts[image + 1]), hw
    covered = 1.0 if table.keypoints is None else BOX_TO_AREA
    outlines = table.instances(image, hw=(1, 1)).outlines()
    for row, (box, outline) in enumerate(zip(table.boxes_cxcywh[part].astype(np.float64), outlines)):
        cx, cy, bw, bh = (box * (w, h, w, h)).tolist()
        shape = {"bbox": [cx - bw / 2, cy - bh / 2, bw, bh], "area": bw * bh * covered, "segmentation": []}
        if outline:
            rings = [ring.astype(np.float64) * (w, h) for joint in outline for ring in cut_bridges(joint)]
            code = encode_polygons([joined(rings).ravel()], hw)
            polygons = [ring.ravel().tolist() for ring in rings]
            shape |= {"area": float(areas_of([code])[0]), "segmentation": _as_text(code) if may_overlap(rings) else polygons}
        if table.keypoints is not None:
            shape |= _keypoints(table.keypoints[part][row].astype(np.float64) * (w, h, 1))
        yield shape


def _as_text(code: Code) -> dict[str, Any]:
    """A run-length code for a JSON: polygons of a file cannot say that one is a hole of another."""
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def _keypoints(points: np.ndarray) -> dict[str, Any]:
    """Those of one object (K, 3), px and visibility."""
    seen = points[:, 2] > 0
    flat = [value for x, y, v in (points * seen[:, None]).tolist() for value in (x, y, int(v))]
    return {"keypoints": flat, "num_keypoints": int(seen.sum())}


def _described(keypoints: Keypoints) -> dict[str, Any]:
    """What a category says of its keypoints; a skeleton counts them from 1."""
    names = [f"keypoint{k}" for k in range(keypoints.count)]
    return {"keypoints": names, "skeleton": [[a + 1, b + 1] for a, b in keypoints.limbs]}
