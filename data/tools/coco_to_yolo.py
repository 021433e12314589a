"""COCO instances JSON to YOLO label files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.labels.coco import CocoFile, load_coco
from data.labels.probing import probe_labels
from data.labels.problems import MISSING, Problem
from data.labels.table import ImageLabels
from data.tools.writing import print_image_folders, write_yolo_dataset
from utils.errors import UserError


def coco_to_yolo(
    jsons: Sequence[Path], out: Path, *, images: Sequence[Path] = (), segments: bool = False, exist_ok: bool = False
) -> list[Problem]:
    """Writes label files, images where they are given, and ``data.yaml``; a JSON is a split, named after its file.

    Args:
        jsons: instances files that share their categories.
        out: folder to write.
        images: a folder of images for each JSON, or none: then only labels are written, and the images belong into ``out/images``.
        segments: write polygons for objects that have one in one piece.
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
    splits = [path.stem.removeprefix("instances_") for path in jsons]
    labels: dict[str, ImageLabels] = {}
    sources: dict[str, Path] = {}
    absent: list[Problem] = []
    for i, (split, coco) in enumerate(zip(splits, files)):
        folder = images[i] if images else None
        for image_id, name in coco.files.items():
            labels[f"{split}/{name}"] = _image_labels(coco, image_id, name, folder)
            if folder is None:
                continue
            if (folder / name).is_file():
                sources[f"{split}/{name}"] = folder / name
            else:
                absent.append(Problem(str(folder / name), 0, "no such file", False, MISSING))
    problems = (
        [p for f in files for p in f.problems] + [p for found in labels.values() for p in found.problems] + list(dict.fromkeys(absent))
    )
    usable = {name: found for name, found in labels.items() if found.is_usable}
    write_yolo_dataset(out, usable, names, sources, segments=segments, exist_ok=exist_ok)
    objects, crowds = sum(len(f.classes) for f in labels.values()), sum(f.crowds for f in files)
    print(f"{len(labels)} images, {objects} objects of {len(names)} classes in {out / 'data.yaml'}"
          + (f"; {crowds} crowd regions left out, YOLO labels have none" if crowds else ""))  # fmt: skip
    print_image_folders(out, splits, have_images=bool(images))
    return problems


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
