"""A COCO instances JSON, read with patience: a faulty annotation is a line for the user, only a file of another kind is refused.

Training takes its labels from here, and validation its ground truth.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError
from utils.files import read_bounded
from utils.reading.limits import MAX_JSON_BYTES

log = logging.getLogger(__name__)
UNKNOWN = -1  # class of a category that the file's list lacks
NO_CATEGORY = "its category is not in the file's list"
MAX_SIDE_PX = 2**31
SIZE_SLACK_PX = 1  # between the size in the file and the image's
BROKEN_BOX = "bbox: four finite numbers left, top, width, height in px are expected"


class CocoObject(NamedTuple):
    """An annotation."""

    row: int  # place in the file, from 1
    id: int  # its place where the file gives none
    image_id: int
    label: int  # class, or UNKNOWN
    bbox: tuple[float, ...]  # left, top, width, height in px; NaN where it is broken
    area: float  # px², the box's where none is given
    crowd: bool
    segmentation: Any = None  # polygons or a run-length code as they stand in the file, not checked
    keypoints: Any = None  # as in the file; None where it gives none

    @property
    def fault(self) -> str:
        """What is wrong with it by itself; empty for a sound one."""
        return NO_CATEGORY if self.label == UNKNOWN else "" if math.isfinite(sum(self.bbox)) else BROKEN_BOX


@dataclass(frozen=True)
class CocoContent:
    """An instances JSON.

    Attributes:
        path: The file.
        names: Of its classes, in order.
        category_ids: Per class; all of them where they count as one.
        images: By id, as they stand in the file.
        objects: Annotations of its images and of categories that have a class.
        lost: How many annotations belong to none of its images, in words; empty for none.
        unnamed: How many objects are of categories without a class, in words; empty for none.
        skeleton: Pairs of keypoints as the first category with some gives them, counted from 1 and not checked; None for none.
    """

    path: Path
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: Mapping[int, Mapping[str, Any]]
    objects: Sequence[CocoObject]
    lost: str
    unnamed: str
    skeleton: Any = None

    @property
    def files(self) -> dict[int, str]:
        """Image id: file name."""
        return {i: str(entry["file_name"]) for i, entry in self.images.items()}

    @property
    def sizes_hw(self) -> dict[int, tuple[int, int]]:
        """Image id: height and width in px, where the file says them."""
        return {i: (int(e["height"]), int(e["width"])) for i, e in self.images.items() if _is_size(e)}


def read_coco_file(path: Path, names: Sequence[str] | None = None, *, single: bool = True) -> CocoContent:
    """Reads an instances JSON.

    Args:
        path: The file.
        names: Classes in order; matched to the file's categories by name, else by order if there are as many.
        single: Without ``names``: make all objects class 0, rather than take the file's own categories in the order of their ids.

    Raises:
        UserError: No JSON, or one without images, annotations and categories, or with others than ``names``.
    """
    content = read_json(path)
    images = {int(i["id"]): i for i in content["images"]}
    categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
    if names is None and not single:
        names = [categories[i] for i in sorted(categories)]
    ids = tuple(sorted(categories)) if names is None else match_categories(path, categories, names)
    class_of = dict.fromkeys(ids, 0) if names is None else {i: c for c, i in enumerate(ids)}
    objects, lost, unnamed = list[CocoObject](), list[int](), 0
    for row, entry in enumerate(content["annotations"], start=1):
        if not isinstance(entry, dict) or not _is_id(entry.get("image_id")) or entry["image_id"] not in images:
            lost.append(row)
            continue
        category: Any = entry.get("category_id")
        is_known = _is_id(category) and category in categories
        if is_known and category not in class_of:
            unnamed += 1
        else:
            objects.append(_object(row, entry, class_of[category] if is_known else UNKNOWN))
    others = ", ".join(sorted(n for i, n in categories.items() if i not in class_of)[:5])
    return CocoContent(
        path, tuple(names or ("item",)), ids, images, objects,
        f"{len(lost)} annotations belong to no image of the file, first: number {lost[0]}" if lost else "",
        f"{unnamed} objects of categories that the dataset file does not name ({others} …) are left out" if unnamed else "",
        next((c["skeleton"] for c in content["categories"] if c.get("skeleton")), None),
    )  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The content of an instances JSON, whose images and categories are sound; its annotations may be anything.

    Raises:
        UserError: It is none.
    """
    try:
        content = json.loads(read_bounded(path, limit=MAX_JSON_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({' '.join(str(error).split())[:100]})") from error
    missing = [k for k in ("images", "annotations", "categories") if not isinstance(content, dict) or not isinstance(content.get(k), list)]
    if missing:
        raise UserError(f"{path}: not a COCO instances JSON, the list {missing[0]!r} is missing")
    broken = [c for c in content["categories"] if not (isinstance(c, dict) and _is_id(c.get("id")) and "name" in c)]
    if broken:
        raise UserError(f"{path}: category {str(broken[0])[:60]!r}: a whole number 'id' and a 'name' are expected")
    broken = [i for i in content["images"] if not (isinstance(i, dict) and _is_id(i.get("id")) and i.get("file_name"))]
    if broken:
        raise UserError(f"{path}: image {str(broken[0])[:60]!r}: a whole number 'id' and a 'file_name' are expected")
    return content


def sound_annotations(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The annotations of :func:`read_json`'s content that can be ground truth, with area and crowd filled in, numbered from 1.

    A number 0, or one that comes twice, would be no match to pycocotools.
    """
    images, categories = ({entry["id"] for entry in content[key]} for key in ("images", "categories"))
    found = list[dict[str, Any]]()
    for entry in content["annotations"]:
        if isinstance(entry, dict) and entry.get("image_id") in images and entry.get("category_id") in categories:
            known = _object(0, entry, 0)
            own = {"id": len(found) + 1, "bbox": list(known.bbox), "area": known.area, "iscrowd": int(known.crowd)}
            found += [{**entry, **own}] if not known.fault else []
    return found


def match_categories(path: Path, categories: Mapping[int, str], names: Sequence[str]) -> tuple[int, ...]:
    """The category id of each class: by name, else in the order of ids if there are as many, which a warning says.

    Letter case counts only where names differ by nothing else.

    Raises:
        UserError: Neither fits, or the order would give a category the name of another.
    """
    for normal in (str.strip, lambda name: name.strip().casefold()):
        by_name = {normal(name): i for i, name in categories.items()}
        if all(normal(n) in by_name for n in names) and len({by_name[normal(n)] for n in names}) == len(names):
            return tuple(by_name[normal(n)] for n in names)
    in_order = sorted(categories)
    known = {name.strip().casefold() for name in categories.values()}
    missing = next((n for n in names if n.strip().casefold() not in known), names[-1])
    if len(categories) != len(names):
        raise UserError(f"{path}: no category named {missing!r}, and its {len(categories)} categories are not {len(names)} to go by order")
    for i, name in zip(in_order, names):
        if (own := categories[i].strip().casefold()) != name.strip().casefold() and own in {n.strip().casefold() for n in names}:
            raise UserError(
                f"{path}: no category named {missing!r}, and by order its {categories[i]!r} would be {name!r}; expected the categories "
                f"{', '.join(map(repr, names[:5]))}"
            )
    if [categories[i] for i in in_order] != [str(i) for i in in_order]:
        by_order = f"so its {len(names)} categories are taken in the order of their ids: {categories[in_order[0]]!r} is {names[0]!r}"
        log.warning("%s: no category named %r, %s", path, missing, by_order)
    return tuple(in_order)


def image_ids_by_name(files: Mapping[int, str]) -> dict[str, int]:
    """Image ids by file name as the JSON has it, and by the name without folders where only one image is called so."""
    plain = {i: plain_name(name) for i, name in files.items()}
    count = Counter(PurePosixPath(name).name for name in plain.values())
    bases = {base: i for i, name in plain.items() if count[base := PurePosixPath(name).name] == 1}
    return bases | {name: i for i, name in plain.items()}


def plain_name(name: str) -> str:
    """A file name with slashes in place of backslashes, and without ``./``."""
    return PurePosixPath(name.replace("\\", "/")).as_posix()


def number_images(paths: Sequence[str]) -> list[int]:
    """Ids of images that no COCO file lists: their names where all of them are different numbers, else 1, 2, 3 … in the order given.

    ``data.convert`` writes them, and ``--save-json`` the same for the same list of images.
    """
    stems = [Path(path).stem for path in paths]
    numbers = [int(s) for s in stems] if all(s.isdecimal() for s in stems) else []
    return numbers if len(set(numbers)) == len(paths) else list(range(1, len(paths) + 1))


def find_image_id(image_ids: Mapping[str, int], path: str | Path) -> int | None:
    """The id of a file: by its name, or by as much of its path as distinguishes images of one name."""
    parts = PurePosixPath(plain_name(str(path))).parts
    for depth in range(len(parts), 0, -1):  # a/1.jpg before 1.jpg
        name = "/".join(parts[-depth:])
        if name in image_ids:
            return image_ids[name]
    return None


def _object(row: int, entry: Mapping[str, Any], label: int) -> CocoObject:
    """An annotation, whatever is in it."""
    try:
        bbox = tuple(map(float, entry["bbox"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        bbox = ()
    bbox = bbox if len(bbox) == 4 else (math.nan,) * 4
    try:
        area = float(entry["area"])
    except (KeyError, TypeError, ValueError, OverflowError):
        area = math.nan
    own_id = entry["id"] if _is_id(entry.get("id")) else row
    return CocoObject(
        row, own_id, entry["image_id"], label, bbox, area if math.isfinite(area) else bbox[2] * bbox[3],
        bool(entry.get("iscrowd")), entry.get("segmentation"), entry.get("keypoints"),
    )  # fmt: skip


def is_keypoints(given: Any, count: int) -> bool:
    """Whether an annotation's ``keypoints`` are x, y and visibility of so many keypoints."""
    if not isinstance(given, list) or len(given) != 3 * count:
        return False
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in given)
    return numbers and all(v in (0, 1, 2) for v in given[2::3])


def keypoint_array(given: Sequence[Any], count: int) -> NDArray[np.float64]:
    """(n, K, 3) of x, y in px and visibility of annotations' ``keypoints``; zeros for those without sound ones."""
    rows = [entry if is_keypoints(entry, count) else [0.0] * (3 * count) for entry in given]
    return np.array(rows, np.float64).reshape(-1, count, 3)


def _is_size(entry: Mapping[str, Any]) -> bool:
    return all(isinstance(entry.get(k), (int, float)) and 1 <= entry[k] <= MAX_SIDE_PX for k in ("height", "width"))


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
