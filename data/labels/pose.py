"""Pose labels for a task that reads no keypoints: only the box of each row is used; and sets whose rows and ``kpt_shape`` disagree.

A pose row is ``class cx cy w h`` and K times ``x y`` or ``x y visibility``. As a polygon it would be an object that nobody has drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from data.labels.table import LabelTable
from tasks import Task
from tasks.rows import COLUMNS, ROUNDING, InvalidRow, LabelRow

BOX_COLUMNS = 5
KEYPOINTS_TASK = "keypoints"  # ``Task.coco_type`` of one that reads them
MIN_ROWS = 3  # fewer may look like anything


def parse_box_of_pose(values: Sequence[str], *, task: Task, kpt_shape: tuple[int, int]) -> LabelRow | InvalidRow:
    """The box of a pose row, or of a row of only a box; any other number of columns is invalid."""
    points, size = kpt_shape
    if len(values) not in (BOX_COLUMNS, BOX_COLUMNS + points * size):
        expected = f"{BOX_COLUMNS + points * size}: class cx cy w h and {points} times x y{' visibility' * (size == 3)}"
        return InvalidRow(f"{len(values)} columns, expected by kpt_shape [{points}, {size}]: {expected}; or 5: a box alone", COLUMNS)
    return task.parse_row(values[:BOX_COLUMNS])


def row_parser(task: Task, kpt_shape: tuple[int, int] | None) -> partial[LabelRow | InvalidRow] | None:
    """Reads the rows of a set of pose labels for a task without keypoints; None where the task reads them, or there are none."""
    if kpt_shape is None or task.coco_type == KEYPOINTS_TASK:
        return None
    return partial(parse_box_of_pose, task=task, kpt_shape=kpt_shape)


def pose_remark(task: Task, kpt_shape: tuple[int, int] | None) -> str:
    """A line that says that keypoints are not used; empty where there are none."""
    if row_parser(task, kpt_shape) is None:
        return ""
    return f"kpt_shape {list(kpt_shape or ())}: the boxes of the labels are used, their keypoints are not (task {task.name})"


def lacks_keypoints(table: LabelTable) -> bool:
    """Whether no object has a labelled keypoint, although every row could be read."""
    if not len(table.classes) or any(problem.skips for problem in table.problems):
        return False
    return table.keypoints is None or not (table.keypoints[..., 2] > 0).any()


def wrong_pose_remark(table: LabelTable) -> str:
    """A line for the user where most boxes of a set with ``kpt_shape`` reach outside the image, as polygons read as boxes do."""
    centre, half = table.boxes_cxcywh[:, :2], table.boxes_cxcywh[:, 2:] / 2
    outside = int(((centre - half < -ROUNDING) | (centre + half > 1 + ROUNDING)).any(1).sum())
    if outside < MIN_ROWS or 2 * outside <= len(centre):
        return ""
    found = f"{outside} of {len(centre)} boxes reach outside their image"
    return f"warning: {found}: if the rows are polygons, remove kpt_shape from the dataset file"


def unnamed_pose_remark(table: LabelTable) -> str:
    """A line for the user where all polygons of a set look like pose rows, which it reads as polygons; empty otherwise.

    They do if all have the same number of columns, the first four coordinates are a box inside the image, and the rest lie inside that
    box. Polygons rarely do, because none of them may lie in the right or lower third of its image.
    """
    counts = np.diff(table.point_starts)
    starts, counts = table.point_starts[:-1][counts > 0], counts[counts > 0]
    if len(counts) < MIN_ROWS or counts.min() != counts.max():
        return ""
    points = table.points.reshape(len(starts), counts[0], 2)
    centre, half = points[:, :1], points[:, 1:2] / 2
    in_image = (centre - half >= -ROUNDING) & (centre + half <= 1 + ROUNDING)
    in_box = np.abs(points[:, 2:] - centre) <= half + ROUNDING
    if not (in_image.all() and in_box.all()):
        return ""
    found = f"all {len(starts)} rows of {1 + 2 * counts[0]} columns are read as polygons, but look like pose labels"
    shape = [int(counts[0]) - 2, 2]
    return f"warning: {found}: write kpt_shape: {shape} into the dataset file if they are (their boxes are used then)"
