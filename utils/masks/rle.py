"""Masks as COCO's run-length codes: small enough to keep those of a whole data set, and compared without being unpacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from utils.metrics.matching import Objects

Code = Mapping[str, Any]  # {"size": [height, width], "counts": bytes}
FIELD = "masks"


def encode(masks: NDArray[np.uint8]) -> NDArray[np.object_]:
    """Masks (n, h, w) of 0 and 1 to n codes."""
    from pycocotools import mask as coco_mask

    codes = np.empty(len(masks), dtype=object)
    if len(masks):
        codes[:] = coco_mask.encode(np.asfortranarray(masks.astype(np.uint8).transpose(1, 2, 0)))
    return codes


def encode_polygons(polygons: Sequence[Sequence[float]], hw: tuple[int, int]) -> Code:
    """One object in one or several pieces, each x1 y1 x2 y2 … in px, as COCO rasterises it."""
    from pycocotools import mask as coco_mask

    return coco_mask.merge(coco_mask.frPyObjects([list(map(float, piece)) for piece in polygons], *hw))


def decode(codes: Sequence[Code], hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Codes to masks (n, h, w) of 0 and 1; ``hw`` is for none at all."""
    from pycocotools import mask as coco_mask

    return coco_mask.decode(list(codes)).transpose(2, 0, 1) if len(codes) else np.zeros((0, *hw), np.uint8)


def areas(objects: Objects) -> NDArray[np.float64]:
    """The area (n,) of each object's mask in px²."""
    from pycocotools import mask as coco_mask

    codes = objects.fields[FIELD]
    return coco_mask.area(list(codes)).astype(np.float64) if len(codes) else np.zeros(0)


def mask_overlap(dets: Objects, truth: Objects, d: NDArray, g: NDArray) -> NDArray[np.float64]:
    """Intersection over union of pairs of masks (over the detection's area for crowds), (p,): a :data:`utils.metrics.matching.Similarity`.

    Pairs come with all objects of a detection's group side by side; pycocotools compares one image at a time.
    """
    from pycocotools import mask as coco_mask

    found = np.zeros(len(d))
    image = dets.image[d]
    order = np.argsort(image, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(image[order])) + 1) if len(d) else ():
        det, det_place = np.unique(d[rows], return_inverse=True)
        obj, obj_place = np.unique(g[rows], return_inverse=True)
        codes = (list(dets.fields[FIELD][det]), list(truth.fields[FIELD][obj]))
        overlap = coco_mask.iou(*codes, truth.crowd[obj].astype(np.uint8).tolist())
        found[rows] = overlap[det_place, obj_place]
    return found
