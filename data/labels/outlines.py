"""Objects of a segmentation set that have a box and no outline: their masks are their boxes, which the user should know."""

from __future__ import annotations

import numpy as np

from data.labels.table import LabelTable
from tasks import Task
from utils.errors import UserError

MASKS_TASK = "segm"  # ``Task.coco_type`` of one that reads outlines


def outline_remark(task: Task, table: LabelTable, *, source: str) -> str:
    """A warning where some objects have no outline, and the task reads outlines; empty otherwise.

    Raises:
        UserError: none of the objects has one.
    """
    if task.coco_type != MASKS_TASK or not len(table.classes):
        return ""
    boxes = int((np.diff(table.point_starts) == 0).sum())
    if boxes == len(table.classes):
        expected = f"the task {task.name} learns masks from {task.expected_row.partition(', or')[0]}"
        raise UserError(f"{source}: none of its {boxes} objects has an outline, and {expected}; give other labels, or a detection model")
    some = f"{boxes} of {len(table.classes)} objects"
    return f"warning: {source}: {some} have a box and no outline: their masks are their boxes" if boxes else ""
