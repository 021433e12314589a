"""Labels from a COCO instances JSON: the objects of each image, as the rows of a label file would give them.

Crowd regions are not objects to train on, so they are left out here; validation takes the JSON itself as ground truth and ignores
detections inside them. An invalid annotation costs its image, as an invalid row of a label file does.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.labels.checks import drop_duplicates
from data.labels.probing import map_images, probe_labels
from data.labels.problems import ANNOTATIONS, MISSING, NO_AREA, NOT_FINITE, OUT_OF_RANGE, OUTLINE, WRONG_CLASS, Problem
from data.labels.table import ImageLabels, LabelTable, breaks_of, build_table
from tasks.rows import COLUMNS, ROUNDING
from utils.masks.coco_outlines import rings_of_annotation
from utils.metrics.coco_file import (
    BROKEN_BOX,
    NO_CATEGORY,
    SIZE_SLACK_PX,
    CocoObject,
    find_image_id,
    image_ids_by_name,
    is_keypoints,
    keypoint_array,
    read_coco_file,
)

OVERHANG_PX = 2.0  # beyond the border that a box may reach and still be clipped
POLYGON_PX = 2.0  # by which a polygon's extent may differ from its box


@dataclasses.dataclass(frozen=True)
class CocoFile:
    """An instances JSON by image.

    Attributes:
        path: the file.
        names: of its classes, in order.
        files: image id: file name as the JSON has it.
        sizes_hw: image id: height and width in px, where given.
        image_ids: by name, for ``find_image_id``.
        objects: image id: its annotations without crowd regions.
        crowds: number of crowd regions.
        problems: about the file as a whole.
        keypoints: of an object, where they are read.
        skeleton: as CocoContent has it.
    """

    path: Path
    names: tuple[str, ...]
    files: Mapping[int, str]
    sizes_hw: Mapping[int, tuple[int, int]]
    image_ids: Mapping[str, int]
    objects: Mapping[int, Sequence[CocoObject]]
    crowds: int
    problems: tuple[Problem, ...]
    keypoints: int | None = None
    skeleton: Any = None

    def labels_of(self, image_id: int, hw: tuple[int, int], shown_path: str) -> ImageLabels:
        """The objects of one image; problems name its path.

        Args:
            image_id: of the image.
            hw: its size in px, as displayed.
            shown_path: its file.
        """
        given = self.sizes_hw.get(image_id, hw)
        if max(abs(a - b) for a, b in zip(given, hw)) > SIZE_SLACK_PX:
            message = f"{hw[1]}x{hw[0]} px, but {self.path.name} says {given[1]}x{given[0]}"
            return ImageLabels.unusable(Problem(shown_path, 0, message, True, ANNOTATIONS), has_label_file=True)
        objects = self.objects.get(image_id, ())
        if not objects:
            return ImageLabels.background(hw, has_label_file=True)
        classes = np.array([o.label for o in objects], np.int64)
        boxes = np.array([o.bbox for o in objects], np.float64).reshape(-1, 4)  # (n, 4) ltwh px
        faults = self._find_faults(objects, classes, boxes, hw, shown_path)
        if any(p.skips for p in faults):
            return ImageLabels.unusable(*faults, has_label_file=True)
        keep = np.flatnonzero((boxes[:, 2:] > 0).all(1)).tolist()
        labels = _normalised([objects[i] for i in keep], boxes[keep], hw, faults, (shown_path, self.path.name))
        if self.keypoints is not None:
            points = keypoint_array([objects[i].keypoints for i in keep], self.keypoints)
            labels = labels._replace(keypoints=(points / (hw[1], hw[0], 1)).astype(np.float32))
        return drop_duplicates(labels, shown_path)

    def _find_faults(
        self, objects: Sequence[CocoObject], classes: np.ndarray, boxes_ltwh: np.ndarray, hw: tuple[int, int], shown_path: str
    ) -> list[Problem]:
        """A problem for each annotation of one image that is wrong."""
        low, high = boxes_ltwh[:, :2], boxes_ltwh[:, :2] + boxes_ltwh[:, 2:]
        slack = max(OVERHANG_PX, ROUNDING * max(hw))
        finite = np.isfinite(boxes_ltwh).all(1)
        with np.errstate(invalid="ignore"):
            outside = ((low < -slack) | (high > np.array(hw[::-1]) + slack)).any(1)
            empty = finite & ~outside & (boxes_ltwh[:, 2:] <= 0).any(1)
        checks: list[tuple[np.ndarray, str, str, bool]] = [
            (classes < 0, WRONG_CLASS, NO_CATEGORY, True),
            ((classes >= 0) & ~finite, NOT_FINITE, BROKEN_BOX, True),
            ((classes >= 0) & finite & outside, OUT_OF_RANGE, f"bbox reaches outside the {hw[1]}x{hw[0]} px of the image", True),
            ((classes >= 0) & empty, NO_AREA, "a box without area, dropped", False),
        ]
        if self.keypoints is not None:
            known = [o.keypoints is None or is_keypoints(o.keypoints, self.keypoints) for o in objects]
            message = f"keypoints: {self.keypoints} times x, y in px and visibility 0, 1 or 2 are expected by kpt_shape"
            checks.append((~np.array(known), COLUMNS, message, True))
        return [
            Problem(shown_path, 0, f"annotation {objects[i].id} of {self.path.name}: {text}", skips, kind)
            for bad, kind, text, skips in checks
            for i in np.flatnonzero(bad).tolist()
        ]


def read_coco_labels(
    path: Path, image_files: Sequence[str], names: Sequence[str] | None, *, channels: int = 3, workers: int = 8, prefix: str = "",
    progress: bool = True, keypoints: int | None = None,
) -> LabelTable:  # fmt: skip
    """Checks all images and takes their objects from a JSON.

    Args:
        path: the JSON.
        image_files: N images.
        names: of the classes; None makes all objects class 0.
        channels: that the images should have.
        workers: most parallel readers of images.
        prefix: words before the progress bar.
        progress: whether to show it.
        keypoints: of an object; None reads none.
    """
    coco = dataclasses.replace(load_coco(path, names), keypoints=keypoints)
    probe = partial(probe_labels, channels=channels)
    probed = map_images(probe, image_files, workers=workers, title=f"{prefix}checking images", progress=progress)
    ids = [find_image_id(coco.image_ids, f) for f in image_files]
    table = build_table([_with_objects(coco, i, p, f) for i, p, f in zip(ids, probed, image_files)])
    about, present = coco.problems, set(ids)
    absent = [name for i, name in coco.files.items() if i not in present]
    if absent:
        message = f"{len(absent)} of its {len(coco.files)} images are not there, first: {absent[0]}"
        about += (Problem(str(path), 0, message, False, MISSING),)
    return dataclasses.replace(table, problems=(*about, *table.problems))


def load_coco(path: Path, names: Sequence[str] | None = None, *, single: bool = True) -> CocoFile:
    """Reads an instances JSON as ``read_coco_file`` does, and sorts it by image."""
    content = read_coco_file(path, names, single=single)
    objects: defaultdict[int, list[CocoObject]] = defaultdict(list)
    for found in content.objects:
        if not found.crowd:
            objects[found.image_id].append(found)
    remarks = ((content.lost, ANNOTATIONS), (content.unnamed, WRONG_CLASS))
    return CocoFile(
        path, content.names, content.files, content.sizes_hw, image_ids_by_name(content.files), objects,
        sum(o.crowd for o in content.objects), tuple(Problem(str(path), 0, text, False, kind) for text, kind in remarks if text),
        skeleton=content.skeleton,
    )  # fmt: skip


def _with_objects(coco: CocoFile, image_id: int | None, probed: ImageLabels, image_file: str) -> ImageLabels:
    if not probed.is_usable:
        return probed._replace(has_label_file=image_id is not None)
    if image_id is None:
        problem = Problem(image_file, 0, f"not among the images of {coco.path.name}", True, ANNOTATIONS)
        return ImageLabels.unusable(problem, has_label_file=False)
    return coco.labels_of(image_id, probed.hw, image_file)


def _normalised(
    objects: Sequence[CocoObject], boxes_ltwh: np.ndarray, hw: tuple[int, int], problems: Sequence[Problem], where: tuple[str, str]
) -> ImageLabels:
    """Boxes (n, 4) in px and their outlines as a label file would have them; ``where`` names image and file in messages."""
    size = np.array(hw[::-1], np.float64)
    low = np.clip(boxes_ltwh[:, :2] / size, 0, 1)
    high = np.clip((boxes_ltwh[:, :2] + boxes_ltwh[:, 2:]) / size, 0, 1)
    found = [_outline(o, box, hw) for o, box in zip(objects, boxes_ltwh)]
    faults = [
        Problem(where[0], 0, f"annotation {o.id} of {where[1]}: {fault}; its box is used", False, OUTLINE)
        for o, (_, fault) in zip(objects, found)
        if fault
    ]
    rings = [[np.clip(ring / size, 0, 1) for ring in outline] for outline, _ in found]
    return ImageLabels(
        hw, True, np.array([o.label for o in objects], np.int64), np.concatenate(((low + high) / 2, high - low), 1).astype(np.float32),
        np.array([o.row for o in objects], np.int64),
        np.concatenate([np.zeros((0, 2)), *(ring for outline in rings for ring in outline)]).astype(np.float32),
        np.array([sum(map(len, outline)) for outline in rings], np.int64), (*problems, *faults),
        breaks=breaks_of([[len(ring) for ring in outline] for outline in rings]),
    )  # fmt: skip


def _outline(found: CocoObject, box_ltwh: np.ndarray, hw: tuple[int, int]) -> tuple[list[np.ndarray], str]:
    """The rings (k, 2) px of an object, and what is wrong with them; none where they do not fit its box."""
    rings, fault = rings_of_annotation(found.segmentation, hw)
    if not rings:
        return [], fault
    low, high = np.min([r.min(0) for r in rings], axis=0), np.max([r.max(0) for r in rings], axis=0)
    if np.abs(np.concatenate((low, high - low)) - box_ltwh).max() > POLYGON_PX:
        return [], ""
    return rings, ""
