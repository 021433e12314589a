"""What a result has beside boxes: the fields of its task's detections, in the form in which people use them.

A task joins in one of two ways, and nothing here asks which task it is. Fields of ``Detections`` are attributes of a result under their own
names, or as ``VIEWS`` says: masks are unpacked, an angle makes oriented boxes. What is no field, such as the probabilities of all
classes, a task gives as ``result_fields``: a mapping of names to functions of (detections, (height, width)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks import Task
from utils.boxes import xyxy_to_cxcywh
from utils.masks.packed import unpack_tensor
from utils.types import Detections

STANDARD = ("masks", "keypoints", "obb", "probs")  # attributes that every result has: None where its task has none
View = Callable[[Detections, tuple[int, int]], Any]


class FieldView(NamedTuple):
    """A field of detections as people read it."""

    attribute: str
    of: View


def unpacked_masks(found: Detections, hw: tuple[int, int]) -> Tensor:
    """(n, H, W) bool from (n, H, ceil(W / 8)), bits packed along the width."""
    return unpack_tensor(found.fields["masks"], hw[1]).bool()


def oriented_boxes(found: Detections, hw: tuple[int, int]) -> Tensor:
    """(n, 5) centre, width and height in px, and the angle in radians."""
    return torch.cat((xyxy_to_cxcywh(found.boxes), found.fields["angle"].reshape(-1, 1).to(found.boxes)), dim=1)


def corners(obb: Tensor) -> Tensor:
    """(n, 4, 2) corners in px of boxes (n, 5), from that which is top left before the rotation, clockwise in the image."""
    cosine, sine = obb[:, 4].cos(), obb[:, 4].sin()
    across = torch.stack((cosine, sine), dim=1) * obb[:, 2:3] / 2  # (n, 2)
    down = torch.stack((-sine, cosine), dim=1) * obb[:, 3:4] / 2
    centre = obb[:, :2]
    return torch.stack((centre - across - down, centre + across - down, centre + across + down, centre - across + down), dim=1)


VIEWS: dict[str, FieldView] = {"masks": FieldView("masks", unpacked_masks), "angle": FieldView("obb", oriented_boxes)}


def result_fields(task: Task, found: Detections) -> dict[str, View]:
    """The attributes of a result of this task, and the function that gives each."""
    views: dict[str, View] = {}
    for name in found.fields:
        view = VIEWS.get(name) or FieldView(name, _raw(name))
        views[view.attribute] = view.of
    of_task: Mapping[str, View] = getattr(task, "result_fields", {})
    return {**views, **of_task}


def _raw(name: str) -> View:
    return lambda found, hw: found.fields[name]
