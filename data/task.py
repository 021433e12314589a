"""What the input pipeline asks of a task: the meaning of a label file's row, and what a batch carries of an image's objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from data.labels.instances import Instances
from data.labels.rows import InvalidRow, LabelRow, parse_detection_row


class DataTask(Protocol):
    """The part of a task that the data see. Its methods are pickled for worker processes."""

    @property
    def name(self) -> str:
        """Names the columns of label files; part of the label cache's key."""

    def parse_row(self, values: Sequence[str], /) -> LabelRow | InvalidRow:
        """The object that a row describes, or what is wrong with the row."""

    def targets(self, instances: Instances, hw: tuple[int, int], /) -> Mapping[str, np.ndarray]:
        """Arrays by name, each with a row for every object: ``classes`` (n,) and ``boxes`` (n, 4) at least.

        Args:
            instances: the n objects of an image, in px of the batch's image.
            hw: height and width of that image in px.
        """


class DetectionData:
    """Detection: rows of boxes or polygons, targets of boxes."""

    name = "detect"

    def parse_row(self, values: Sequence[str], /) -> LabelRow | InvalidRow:
        """See ``parse_detection_row``."""
        return parse_detection_row(values)

    def targets(self, instances: Instances, hw: tuple[int, int], /) -> dict[str, np.ndarray]:
        """``classes`` (n,) and ``boxes`` (n, 4) as cx, cy, w, h, normalised to the image; all float32."""
        h, w = hw
        b = instances.boxes_xyxy / np.array((w, h, w, h), np.float32)
        boxes = np.concatenate(((b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]), 1)
        return {"classes": instances.classes.astype(np.float32), "boxes": boxes.astype(np.float32)}


DETECTION = DetectionData()
