"""A large image composed of images of the embedded data set at their own size, and recall on it by object size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from data.tools.shapes import draw_image
from utils.boxes import box_iou
from utils.types import Detections

UNSEEN = 7  # a random stream that the data set itself does not use
SIZES_PX = ((8, 16), (16, 32), (32, 96), (96, 1000))  # square root of a box's area


class LargeImage(NamedTuple):
    """An image and its objects."""

    image: np.ndarray  # (side, side, 3) uint8 RGB
    classes: np.ndarray  # (n,)
    boxes_xyxy: np.ndarray  # (n, 4) px

    def yolo_rows(self) -> str:
        """As a label file."""
        side = self.image.shape[0]
        cxcywh = np.concatenate(((self.boxes_xyxy[:, :2] + self.boxes_xyxy[:, 2:]) / 2, self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]), 1)
        return "".join(f"{c} {' '.join(f'{v:.7f}' for v in row / side)}\n" for c, row in zip(self.classes, cxcywh))


def large_image(seed: int, *, side: int = 2560) -> LargeImage:
    """Fills an image row by row with images that no split of the data set holds; the rest is grey."""
    image = np.full((side, side, 3), 114, np.uint8)
    classes: list[int] = []
    boxes: list[np.ndarray] = []
    left = top = height = number = 0
    while True:
        part, labels, corners = draw_image(np.random.default_rng([UNSEEN, seed, number]))
        number += 1
        h, w = part.shape[:2]
        if left + w > side:
            left, top, height = 0, top + height, 0
        if top + h > side:
            return LargeImage(image, np.array(classes), np.array(boxes, np.float32))
        image[top : top + h, left : left + w] = part
        classes += labels
        boxes += [np.array(c) + (left, top, left, top) for c in corners]
        left, height = left + w, max(height, h)


def recall_by_size(found: Detections, truth: LargeImage, *, iou: float = 0.5) -> dict[tuple[int, int], tuple[int, int]]:
    """For each range of ``SIZES_PX`` the number of detected objects and of all objects; a detection matches one object at most."""
    hit = matched(found, truth, iou=iou)
    size = np.sqrt((truth.boxes_xyxy[:, 2:] - truth.boxes_xyxy[:, :2]).prod(1))
    ranges = {r: (size >= r[0]) & (size < r[1]) for r in SIZES_PX}
    return {r: (int(hit[inside].sum()), int(inside.sum())) for r, inside in ranges.items()}


def matched(found: Detections, truth: LargeImage, *, iou: float = 0.5) -> np.ndarray:
    """Which objects (n,) are detected: detections are matched greedily, best score first."""
    overlap = box_iou(found.boxes, torch.from_numpy(truth.boxes_xyxy)) * (found.classes[:, None] == torch.from_numpy(truth.classes))
    hit = np.zeros(len(truth.classes), bool)
    for row in overlap.numpy()[found.scores.argsort(descending=True).numpy()]:
        candidate = np.where(hit, 0, row)
        if candidate.size and candidate.max() > iou:
            hit[candidate.argmax()] = True
    return hit
