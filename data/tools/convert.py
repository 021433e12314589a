"""Annotations from one form into another: COCO JSON to YOLO label files, these to COCO JSON, and VOC XML to YOLO label files.

Example:
    python -m data.convert coco-to-yolo annotations/instances_train2017.json --images train2017 --out converted
    python -m data.convert yolo-to-coco mine.yaml --split val --out instances_val.json
    python -m data.convert voc-to-yolo VOC2012/Annotations --images VOC2012/JPEGImages --out converted

What is broken is left out and named, one line each; files that are there already are not written over without --exist-ok.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.dataset_spec import load_dataset_spec
from data.images.reading import IMAGE_SUFFIXES
from data.labels.checks import check_classes
from data.labels.coco import CocoFile, load_coco
from data.labels.files import list_images
from data.labels.probing import probe_labels
from data.labels.problems import MISSING, Problem
from data.labels.source import split_labels
from data.labels.table import ImageLabels, build_table
from data.labels.voc import read_voc, voc_files
from data.tools.writing import dataset_yaml, label_text, place_image, refuse_existing, same_file, write_text
from utils.errors import UserError
from utils.metrics.coco_eval import category_ids_of


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 0: converted, 1: converted but for what was named, 2: not converted."""
    arguments = _parser().parse_args(argv)
    try:
        problems = arguments.run(arguments)
    except UserError as error:
        print(f"data.tools.convert: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem.line(), file=sys.stderr)
    return 1 if problems else 0


def coco_to_yolo(
    jsons: Sequence[Path], out: Path, *, images: Sequence[Path] = (), segments: bool = False, exist_ok: bool = False
) -> list[Problem]:
    """Writes label files, images where they are given, and ``data.yaml``; a JSON is a split, named after its file.

    Args:
        jsons: Instances files that share their categories.
        out: Folder to write.
        images: A folder of images for each JSON, or none: then only labels are written, and the images belong into ``out/images``.
        segments: Write polygons for objects that have one in one piece.
        exist_ok: Write over files that are there.

    Returns:
        What was left out.

    Raises:
        UserError: A file that cannot be read, is there already or cannot be written, or categories that differ.
    """
    if images and len(images) != len(jsons):
        raise UserError(f"--images: {len(images)} folders for {len(jsons)} JSON files, one for each is expected")
    files = [load_coco(path, single=False) for path in jsons]
    other = next((f for f in files if f.names != files[0].names), None)
    if other is not None:
        raise UserError(f"{other.path}: its categories are not those of {files[0].path}; convert the two on their own")
    splits = [path.stem.removeprefix("instances_") for path in jsons]
    plans = [_labelled(f, folder) for f, folder in zip(files, images or [None] * len(files))]
    labels = {f"{split}/{name}": found for split, plan in zip(splits, plans) for name, found in plan.items()}
    sources = {f"{s}/{n}": folder / n for s, plan, folder in zip(splits, plans, images) for n in plan if (folder / n).is_file()}
    absent = [
        Problem(str(folder / n), 0, "no such file", False, MISSING)
        for plan, folder in zip(plans, images)
        for n in plan
        if not (folder / n).is_file()
    ]
    problems = [p for f in files for p in f.problems] + [p for found in labels.values() for p in found.problems] + absent
    write_yolo(out, {n: f for n, f in labels.items() if f.hw != (0, 0)}, files[0].names, sources, segments=segments, exist_ok=exist_ok)
    objects, crowds = sum(len(f.classes) for f in labels.values()), sum(f.crowds for f in files)
    print(f"{len(labels)} images, {objects} objects of {len(files[0].names)} classes in {out / 'data.yaml'}"
          + (f"; {crowds} crowd regions left out, YOLO labels have none" if crowds else ""))  # fmt: skip
    print_image_folders(out, splits, have_images=bool(images))
    return problems


def yolo_to_coco(data: str, out: Path, *, split: str = "val", exist_ok: bool = False) -> list[Problem]:
    """Writes the labels of a split as an instances JSON.

    Images whose name is a number get it as their id, if all are; else they are counted from 1. Categories have COCO's ids if the classes
    are COCO's 80, else the class numbers.

    Args:
        data: Dataset file.
        out: JSON to write.
        split: ``train``, ``val`` or ``test``.
        exist_ok: Write over a file that is there.

    Returns:
        What was left out.

    Raises:
        UserError: The data set cannot be read, or the file is there already or cannot be written.
    """
    if out.is_dir() or out.suffix.lower() != ".json":
        raise UserError(f"--out {out}: is the JSON file to write, such as {out.with_suffix('') / f'instances_{split}.json'}")
    spec = load_dataset_spec(data, need=(split,))
    files = list_images(spec.sources(split))
    table, _ = split_labels(spec, split, files, progress=sys.stderr.isatty())
    refuse_existing([out], exist_ok=exist_ok)
    table = check_classes(table, files, spec.names, spec.yaml_path)
    base = os.path.commonpath([os.path.dirname(f) for f in files])
    categories = category_ids_of(spec.names)
    images, annotations = [], []
    for i, (image_id, file) in enumerate(zip(_numbers(files), files)):
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
    content = {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in zip(categories, spec.names)]}
    write_text(out, json.dumps(content))
    print(f"{len(images)} images, {len(annotations)} objects of {len(spec.names)} classes in {out}")
    return list(table.problems)


def voc_to_yolo(
    annotations: Path, out: Path, *, images: Path | None = None, names: Sequence[str] = (), split: str = "train", one_based: bool = False,
    difficult: bool = False, exist_ok: bool = False,
) -> list[Problem]:  # fmt: skip
    """Writes a label file for every XML of a folder, and ``data.yaml``.

    Args:
        annotations: Folder of XML files, or one of them.
        out: Folder to write.
        images: Folder of the images; without it only labels are written.
        names: Classes in order; all names that occur, sorted, if not given.
        split: Name of the folders written.
        one_based: Count px from 1 and include the last, as the original VOC archives do; else coordinates are the box's edges.
        difficult: Keep objects marked as difficult.
        exist_ok: Write over files that are there.

    Returns:
        What was left out.

    Raises:
        UserError: No XML file, one that is there already or cannot be written, or no object at all.
    """
    read = [read_voc(path, one_based=one_based, difficult=difficult) for path in voc_files(annotations)]
    names = tuple(names) or tuple(sorted({o for f in read for o in f.labels}))
    if not names:
        first = next((f", first: {f.problems[0]}" for f in read if f.problems), "")
        raise UserError(f"{annotations}: no object in {len(read)} files{first}")
    found = {f.image_name: f.numbered(names) for f in read if not any(p.skips for p in f.problems)}
    problems = [p for f in read for p in f.problems] + [p for f in found.values() for p in f.problems]
    found = {name: f for name, f in found.items() if f.hw != (0, 0)}
    sources = {}
    for name in found if images else ():
        assert images is not None
        source = _image(images, name)
        if source is None:
            problems.append(Problem(str(images / name), 0, "no such file", False, MISSING))
        else:
            sources[f"{split}/{Path(name).stem}{source.suffix}"] = source
    stems = {Path(key).stem: key for key in sources}
    labels = {stems.get(Path(name).stem, f"{split}/{name}"): f for name, f in found.items()}
    write_yolo(out, labels, names, sources, exist_ok=exist_ok)
    skipped = sum(f.difficult for f in read)
    print(f"{len(labels)} images, {sum(len(f.classes) for f in labels.values())} objects of {len(names)} classes in {out / 'data.yaml'}"
          + (f"; {skipped} difficult objects left out (--difficult keeps them)" if skipped else ""))  # fmt: skip
    print_image_folders(out, [split], have_images=images is not None)
    return problems


def print_image_folders(out: Path, splits: Sequence[str], *, have_images: bool) -> None:
    """What is left to do where only labels were written."""
    if not have_images:
        print(f"put the images into {', '.join(str(out / 'images' / s) for s in splits)}, or give their folders with --images")


def write_yolo(
    out: Path, labels: dict[str, ImageLabels], names: Sequence[str], sources: dict[str, Path], *, segments: bool = False,
    exist_ok: bool = False,
) -> None:  # fmt: skip
    """Label files, images and ``data.yaml``.

    Args:
        out: Folder.
        labels: By ``split/name`` of the image.
        names: Of the classes.
        sources: Images to place, likewise.
        segments: Write polygons where there are any.
        exist_ok: Write over files that are there.

    Raises:
        UserError: A file is there already, lies outside ``out``, or cannot be written.
    """
    outside = next((n for n in labels if ".." in Path(n).parts or Path(n).is_absolute()), None)
    if outside is not None:
        raise UserError(f"file name {outside!r} leads out of the data set; relative names without '..' are expected")
    texts = {}
    for name, found in labels.items():
        table = build_table([found])
        polygons = table.instances(0, hw=(1, 1)).polygons() if segments else []
        texts[(out / "labels" / name).with_suffix(".txt")] = label_text(found.classes, found.boxes_cxcywh, polygons)
    splits = list(dict.fromkeys(name.split("/")[0] for name in labels))
    keys = {"train": next((s for s in splits if "val" not in s and "test" not in s), None)}
    keys |= {key: next((s for s in splits if key in s), None) for key in ("val", "test")}
    yaml_text = dataset_yaml({k: f"images/{s}" for k, s in keys.items() if s}, names)
    new = [out / "images" / n for n, source in sources.items() if not same_file(source, out / "images" / n)]
    refuse_existing([*texts, *new, out / "data.yaml"], exist_ok=exist_ok)
    for path, text in texts.items():
        write_text(path, text)
    for name, source in sources.items():
        place_image(source, out / "images" / name)
    write_text(out / "data.yaml", yaml_text)


def _labelled(coco: CocoFile, folder: Path | None) -> dict[str, ImageLabels]:
    """By file name, what the JSON says of each image."""
    return {name: _of_image(coco, i, name, folder) for i, name in coco.files.items()}


def _of_image(coco: CocoFile, image_id: int, name: str, folder: Path | None) -> ImageLabels:
    hw = coco.sizes_hw.get(image_id)
    path = str(folder / name) if folder else name
    if hw is None:
        probed = probe_labels(path)
        if probed.problems:
            return probed
        hw = probed.hw
    return coco.labels_of(image_id, hw, path)


def _numbers(files: Sequence[str]) -> Sequence[int]:
    """An id for each image."""
    stems = [Path(f).stem for f in files]
    named = [int(s) for s in stems] if all(s.isdecimal() for s in stems) else []
    return named if len(set(named)) == len(files) else range(1, len(files) + 1)


def _image(folder: Path, name: str) -> Path | None:
    """The image of an XML: by the name it gives, else by its stem with any ending."""
    if (folder / name).is_file():
        return folder / name
    guesses = ((folder / name).with_suffix(s) for suffix in sorted(IMAGE_SUFFIXES) for s in (suffix, suffix.upper()))
    return next((p for p in guesses if p.is_file()), None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data.convert", description="Converts annotations; what is broken is named.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    coco = commands.add_parser("coco-to-yolo", help="COCO instances JSON to YOLO label files")
    coco.add_argument("jsons", nargs="+", type=Path, metavar="JSON", help="instances files, a split each")
    coco.add_argument("--images", nargs="+", type=Path, default=[], metavar="DIR", help="folder of the images of each, linked or copied")
    coco.add_argument("--segments", action="store_true", help="write polygons of objects in one piece")
    coco.set_defaults(run=lambda a: coco_to_yolo(a.jsons, a.out, images=a.images, segments=a.segments, exist_ok=a.exist_ok))
    yolo = commands.add_parser("yolo-to-coco", help="a YOLO data set's split to a COCO instances JSON")
    yolo.add_argument("data", metavar="DATA.yaml", help="dataset file, or its name under data/")
    yolo.add_argument("--split", default="val", choices=("train", "val", "test"), help="which one to convert (default: val)")
    yolo.set_defaults(run=lambda a: yolo_to_coco(a.data, a.out, split=a.split, exist_ok=a.exist_ok))
    voc = commands.add_parser("voc-to-yolo", help="a folder of VOC XML files to YOLO label files")
    voc.add_argument("annotations", type=Path, metavar="XML-DIR", help="folder of XML files")
    voc.add_argument("--images", type=Path, metavar="DIR", help="folder of the images, linked or copied")
    voc.add_argument("--names", nargs="+", default=[], help="classes in order (default: all that occur, sorted)")
    voc.add_argument("--split", default="train", help="name of the folders written (default: train)")
    voc.add_argument("--one-based", action="store_true", help="px count from 1 and the last is included: the original VOC archives")
    voc.add_argument("--difficult", action="store_true", help="keep objects marked as difficult")
    voc.set_defaults(
        run=lambda a: voc_to_yolo(
            a.annotations, a.out, images=a.images, names=a.names, split=a.split, one_based=a.one_based, difficult=a.difficult,
            exist_ok=a.exist_ok,
        )
    )  # fmt: skip
    folder = "folder to write: labels/, images/ and data.yaml, which train.py takes as --data"
    for command, written in ((coco, folder), (yolo, "JSON file to write"), (voc, folder)):
        command.add_argument("--out", type=Path, required=True, help=written)
        command.add_argument("--exist-ok", action="store_true", help="write over files that are there")
    return parser
