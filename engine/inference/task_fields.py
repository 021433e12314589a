"""What a result has beside boxes: the fields of its task's detections, in the form in which people use them.

A task joins in one of two ways, and nothing here asks which task it is. Fields of ``Detections`` are attributes of a result under their own
names, or as ``VIEWS`` says: masks are unpacked, an angle makes oriented boxes. What is no field, such as the probabilities of all
classes, a task gives as ``result_fields``: a mapping of names to functions of (detections, (height, width)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tasks import Task
from utils.masks.outlines import joined, rings_of_packed
from utils.masks.packed import unpack_tensor
from utils.rotated.boxes import corners_of, rotated_boxes
from utils.types import Detections

STANDARD = ("masks", "keypoints", "obb", "probs")  # attributes that every result has: None where its task has none
View = Callable[[Detections, tuple[int, int]], Any]


class FieldView(NamedTuple):
    """A field of detections as people read it."""

    attribute: str
    of: View


@dataclass(frozen=True)
class Masks:
    """The masks of one image.

    Attributes:
        packed: (n, H, ceil(W / 8)) uint8, eight pixels in a byte.
        hw: height and width of the image in px.
    """

    packed: Tensor
    hw: tuple[int, int]

    def __len__(self) -> int:
        """Number of masks."""
        return len(self.packed)

    @property
    def data(self) -> Tensor:
        """(n, H, W) bool."""
        return unpack_tensor(self.packed, self.hw[1]).bool()

    @property
    def xy(self) -> list[np.ndarray]:
        """The outline of each, (k, 2) px; pieces and holes are joined by bridges that enclose no area. Empty for an empty mask."""
        return [joined(rings) for rings in rings_of_packed(self.packed.numpy())]

    @property
    def xyn(self) -> list[np.ndarray]:
        """``xy`` as fractions of the image."""
        return [outline / np.array(self.hw[::-1], np.float32) for outline in self.xy]


def masks_of(found: Detections, hw: tuple[int, int]) -> Masks:
    """The masks of one image of ``hw`` px, in the order of the boxes."""
    return Masks(found.fields["masks"].cpu(), hw)


def oriented_boxes(found: Detections, hw: tuple[int, int]) -> Tensor:
    """(n, 5) centre, width and height in px, and the angle in radians."""
    return rotated_boxes(found.boxes, found.fields["angle"].to(found.boxes))


def corners(obb: Tensor) -> Tensor:
    """(n, 4, 2) corners in px of boxes (n, 5), from that which is top left before the rotation, clockwise in the image."""
    return corners_of(obb)[:, [2, 1, 0, 3]]


VIEWS: dict[str, FieldView] = {"masks": FieldView("masks", masks_of), "angle": FieldView("obb", oriented_boxes)}


def result_fields(task: Task, found: Detections) -> dict[str, View]:
    """The attributes of a result of this task, and the function that gives each."""
    views: dict[str, View] = {}
    for name in found.fields:
        view = VIEWS.get(name) or FieldView(name, _raw(name))
        views[view.attribute] = view.of
    return {**views, **task.result_fields}


def _raw(name: str) -> View:
    return lambda found, hw: found.fields[name]
