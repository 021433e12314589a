"""Pascal VOC's XML files: one for an image, boxes in px. A document type declaration is refused, so no entity can ever expand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np

from data.labels.checks import drop_duplicates
from data.labels.problems import ANNOTATIONS, NO_AREA, OUT_OF_RANGE, WRONG_CLASS, Problem
from data.labels.table import ImageLabels
from data.labels.tree import walk_tree
from tasks.rows import ROUNDING
from utils.errors import UserError
from utils.files import read_bounded
from utils.reading.limits import MAX_XML_BYTES

OVERHANG_PX = 2.0


@dataclasses.dataclass(frozen=True)
class VocFile:
    """The content of an XML file.

    Attributes:
        path: the file.
        image_name: of the image, without folders.
        hw: its size in px.
        labels: class names, one for each object.
        boxes_xyxy: (n, 4) px.
        difficult: objects left out because they are marked so.
        problems: what is wrong.
    """

    path: Path
    image_name: str
    hw: tuple[int, int]
    labels: tuple[str, ...]
    boxes_xyxy: np.ndarray
    difficult: int
    problems: tuple[Problem, ...]

    def numbered(self, names: Sequence[str]) -> ImageLabels:
        """With class numbers; a name that is not among ``names`` leaves the image out."""
        other = next((n for n in self.labels if n not in names), None)
        if other is not None:
            problem = Problem(str(self.path), 0, f"class {other!r} is not among --names", True, WRONG_CLASS)
            return ImageLabels.unusable(problem, has_label_file=True)
        size = np.array(self.hw[::-1] * 2, np.float64)
        boxes = np.clip(self.boxes_xyxy / size, 0, 1)
        cxcywh = np.concatenate(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), 1).astype(np.float32)
        n = len(boxes)
        classes = np.array([names.index(label) for label in self.labels], np.int64)
        no_points = (np.zeros((0, 2), np.float32), np.zeros(n, np.int64))
        return drop_duplicates(ImageLabels(self.hw, True, classes, cxcywh, np.arange(1, n + 1), *no_points), str(self.path))


def voc_files(source: Path) -> list[Path]:
    """The XML files of a folder, with everything below it, or the file itself.

    Raises:
        UserError: there is none.
    """
    tree = [] if source.is_file() else walk_tree(source)
    found = sorted(Path(top, name) for top, names, _ in tree for name in names if name.lower().endswith(".xml"))
    found = [source] if source.is_file() else found
    if not found:
        raise UserError(f"{source}: no .xml file; a folder of VOC annotations is expected")
    return found


def read_voc(path: Path, *, one_based: bool, difficult: bool) -> VocFile:
    """Reads one file. Nothing wrong with it raises: it is in ``problems``."""
    nothing = VocFile(path, f"{path.stem}.jpg", (0, 0), (), np.zeros((0, 4)), 0, ())
    try:
        root = parse_xml(read_bounded(path, limit=MAX_XML_BYTES))
        hw = (int(_number(root, "size/height")), int(_number(root, "size/width")))
        if min(hw) < 1:
            raise ValueError(f"size {hw[1]}x{hw[0]}: width and height in px are expected")
        name = (root.findtext("filename") or "").replace("\\", "/").rpartition("/")[2].strip() or nothing.image_name
        objects = root.findall("object")
    except (OSError, ValueError, expat.ExpatError) as error:
        return dataclasses.replace(nothing, problems=(Problem(str(path), 0, str(error), True, ANNOTATIONS),))
    kept = [(k, o) for k, o in enumerate(objects, start=1) if difficult or (o.findtext("difficult") or "0").strip() != "1"]
    labels, boxes, problems = [], [], []
    for k, element in kept:
        found = _object(element, hw, one_based)
        if isinstance(found, Problem):
            problems.append(found._replace(path=str(path), message=f"object {k}: {found.message}"))
        else:
            labels.append(found[0])
            boxes.append(found[1])
    array = np.array(boxes, np.float64).reshape(-1, 4)
    return VocFile(path, name, hw, tuple(labels), array, len(objects) - len(kept), tuple(problems))


def parse_xml(data: bytes) -> Element:
    """The root of a document without a document type declaration.

    Raises:
        ValueError: it has one.
        ExpatError: not well-formed.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(data, True)
    return builder.close()


def _refuse(*_: object) -> None:
    raise ValueError("a document type declaration (DOCTYPE) is refused, VOC files have none")


def _number(element: Element, tag: str) -> float:
    text = element.findtext(tag)
    if text is None:
        raise ValueError(f"no {tag}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{tag} is {text.strip()[:40]!r}, a finite number is expected")
    return value


def _object(element: Element, hw: tuple[int, int], one_based: bool) -> tuple[str, list[float]] | Problem:
    """Class name and box (xyxy px) of an object, or what is wrong with it."""
    label = (element.findtext("name") or "").strip()
    if not label:
        return Problem("", 0, "no name", True, WRONG_CLASS)
    try:
        box = [_number(element, f"bndbox/{tag}") for tag in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError as error:
        return Problem("", 0, str(error), True, ANNOTATIONS)
    if one_based:
        box = [box[0] - 1, box[1] - 1, box[2], box[3]]
    slack = max(OVERHANG_PX, ROUNDING * max(hw))
    if min(box) < -slack or max(box[0], box[2]) > hw[1] + slack or max(box[1], box[3]) > hw[0] + slack:
        return Problem("", 0, f"bndbox {box} reaches outside the {hw[1]}x{hw[0]} px of the image", True, OUT_OF_RANGE)
    if box[2] <= box[0] or box[3] <= box[1]:
        return Problem("", 0, "a box without area, dropped", False, NO_AREA)
    return label, box
