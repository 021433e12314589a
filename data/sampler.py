"""How often each training image is drawn: more often where it shows classes that are rare or badly found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.labels.yolo import LabelTable
from utils.errors import UserError


def image_weights(table: LabelTable, class_ap: Sequence[float]) -> np.ndarray:
    """The share (N,) of the draws that each image gets; they sum to 1.

    An image counts the weights of its objects; that of class c is (1 - AP_c)² / objects of class c, as in YOLOv5. Images without
    objects are not drawn.

    Args:
        table: Labels of N images.
        class_ap: mAP@0.5:0.95 of each class; NaN (not measured) counts as the mean of the others, or as 0.

    Raises:
        UserError: No image would be drawn.
    """
    ap = np.asarray(class_ap, dtype=np.float64)
    measured = ap[~np.isnan(ap)]
    ap = np.where(np.isnan(ap), measured.mean() if len(measured) else 0.0, ap)
    objects = np.bincount(table.classes, minlength=len(ap))
    weights = (1 - ap) ** 2 / np.maximum(objects, 1)
    so_far = np.concatenate(([0.0], np.cumsum(weights[table.classes])))
    images = np.maximum(so_far[table.starts[1:]] - so_far[table.starts[:-1]], 0.0) * (np.diff(table.starts) > 0)
    if not images.sum() > 0:
        if not len(table.classes):
            raise UserError("--image-weights: no training image has an object; leave it out")
        images = np.diff(table.starts).astype(np.float64)  # every class is found perfectly
    return images / images.sum()


def draw(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many images as there are (N,), with repeats: image i drawn for the (k + 1)-th time is ``k * N + i``, to look different."""
    count = len(weights)
    drawn = rng.choice(count, size=count, p=weights)
    order = np.argsort(drawn, kind="stable")
    of_equal = drawn[order]
    first = np.searchsorted(of_equal, of_equal)
    repeats = np.empty(count, dtype=np.int64)
    repeats[order] = np.arange(count) - first
    return drawn + repeats * count
