"""COCO instances JSON to YOLO label files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.labels.coco import CocoFile, load_coco
from data.labels.probing import probe_labels
from data.labels.problems import MISSING, Problem
from data.labels.table import ImageLabels
from data.tools.writing import Converted, print_image_folders, write_yolo_dataset
from utils.errors import UserError
from utils.metrics.coco_file import is_keypoints, plain_name


def coco_to_yolo(
    jsons: Sequence[Path], out: Path, *, images: Sequence[Path] = (), segments: bool = False, exist_ok: bool = False
) -> list[Problem]:
    """Writes label files, images where they are given, and ``data.yaml``; a JSON is a split, named after its file.

    Args:
        jsons: instances files that share their categories.
        out: folder to write.
        images: a folder of images for each JSON, or none: then only labels are written, and the images belong into ``out/images``.
        segments: write polygons; the pieces and holes of an object are joined by bridges that enclose no area.
        exist_ok: write over files that are there.

    Returns:
        What was left out.

    Raises:
        UserError: a file that cannot be read, exists already or cannot be written, or categories that differ.
    """
    if images and len(images) != len(jsons):
        raise UserError(f"--images: {len(images)} folders for {len(jsons)} JSON files, one for each is expected")
    files = [load_coco(path, single=False) for path in jsons]
    names = _common_names(files)
    splits = [path.stem.removeprefix("instances_").removeprefix("person_keypoints_") for path in jsons]
    count, remark = _keypoints_of(files, segments=segments)
    files = [dataclasses.replace(f, keypoints=count) for f in files]
    converted: list[Converted] = []
    problems = [p for f in files for p in f.problems]
    for i, (split, coco) in enumerate(zip(splits, files)):
        for image_id in coco.files:
            found, remarks = _convert_image(coco, image_id, split, images[i] if images else None)
            converted += [found] if found else []
            problems += remarks
    more = _described(count, files[0].skeleton) if count else None
    written = write_yolo_dataset(out, converted, names, segments=segments, exist_ok=exist_ok, more=more)
    crowds = sum(f.crowds for f in files)
    print(written + (f"; {crowds} crowd regions left out, YOLO labels have none" if crowds else ""))
    if remark:
        print(remark)
    print_image_folders(out, splits, have_images=bool(images))
    return list(dict.fromkeys(problems))


def _keypoints_of(files: Sequence[CocoFile], *, segments: bool) -> tuple[int | None, str]:
    """How many keypoints the rows will have, None for none; and a line about what is left out or lacking."""
    given = [(f, o.keypoints) for f in files for of_image in f.objects.values() for o in of_image if isinstance(o.keypoints, list)]
    counts = sorted({len(k) // 3 for _, k in given if is_keypoints(k, len(k) // 3) and any(k[2::3])})
    if not counts:
        return None, ""
    if segments:
        return None, "keypoints left out: a row holds an outline or keypoints; leave --segments out for these"
    if len(counts) > 1:
        return None, f"keypoints left out: objects have {' or '.join(map(str, counts))} of them, and all rows of a data set have as many"
    return counts[0], f"kpt_shape: [{counts[0]}, 3]; add flip_idx to data.yaml, without which images are not mirrored in training"


def _described(count: int, skeleton: Any) -> dict[str, Any]:
    """What ``data.yaml`` says of keypoints; a skeleton that is none of so many is left out."""
    described: dict[str, Any] = {"kpt_shape": [count, 3]}
    pairs = skeleton if isinstance(skeleton, list) else []
    if pairs and all(isinstance(p, list) and len(p) == 2 and all(type(k) is int and 1 <= k <= count for k in p) for p in pairs):
        described["skeleton"] = [[a - 1, b - 1] for a, b in pairs]
    return described


def _convert_image(coco: CocoFile, image_id: int, split: str, folder: Path | None) -> tuple[Converted | None, list[Problem]]:
    """An image of a JSON, None where it cannot be used; and what is wrong with it."""
    given = coco.files[image_id]
    name = plain_name(given)
    inside = None if folder is None else _find_below(folder, given)
    labels = _image_labels(coco, image_id, inside or given, folder)
    problems = list(labels.problems)
    if folder is not None and inside is None:
        problems.append(Problem(str(folder / name), 0, "no such file", False, MISSING))
    if not labels.is_usable or (folder is not None and inside is None and ".." in name.split("/")):
        return None, problems
    source = None if folder is None or inside is None else folder / inside
    name = plain_name(inside or given).lstrip("/").removeprefix("images/")  # the data set has a folder of this name for its images already
    return Converted(f"{split}/{name}", labels, f"image {image_id} ({given}) of {coco.path}", source), problems


def _find_below(folder: Path, name: str) -> str | None:
    """An image of a JSON below a folder: by its name, else by as much of its end as is there (``images/x.png`` in ``images``)."""
    parts = [p for p in plain_name(name).split("/") if p]
    if ".." not in parts and not os.path.isabs(name) and os.path.isfile(folder / name):
        return name  # which may have backslashes
    parts = parts[len(parts) - parts[::-1].index("..") :] if ".." in parts else parts
    ends = ("/".join(parts[k:]) for k in range(len(parts)))
    return next((end for end in ends if os.path.isfile(folder / end)), None)


def _common_names(files: Sequence[CocoFile]) -> tuple[str, ...]:
    """The class names that all files share."""
    other = next((f for f in files if f.names != files[0].names), None)
    if other is not None:
        raise UserError(f"{other.path}: its categories are not those of {files[0].path}; convert the two separately")
    return files[0].names


def _image_labels(coco: CocoFile, image_id: int, name: str, folder: Path | None) -> ImageLabels:
    """The labels of one image; its file is opened only where the JSON does not give its size."""
    hw = coco.sizes_hw.get(image_id)
    path = str(folder / name) if folder else name
    if hw is None:
        probed = probe_labels(path)
        if not probed.is_usable:
            return probed
        hw = probed.hw
    return coco.labels_of(image_id, hw, path)
