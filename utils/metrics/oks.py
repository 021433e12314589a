"""Object keypoint similarity (OKS), COCO's overlap of two sets of keypoints: how alike they are, weighed by the size of the object.

A keypoint at distance d from where it should be counts exp(−d² / (2 s² (2σ)²)), s² the object's area and σ what annotators differ by; the
mean over the labelled keypoints is the similarity (https://cocodataset.org/#keypoints-eval).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.metrics.matching import Array, Objects

# Nose, eyes, ears, shoulders, elbows, wrists, hips, knees and ankles of a person.
COCO_SIGMAS = (0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089)
BOX_TO_AREA = 0.53  # of an object without a segmentation: its area as a part of its box's
PAIRS_AT_ONCE = 200_000


def default_sigmas(count: int, values: int = 3) -> tuple[float, ...]:
    """σ of each keypoint where a data set names none: COCO's for its 17 with visibility, else 1 / K."""
    return COCO_SIGMAS if (count, values) == (len(COCO_SIGMAS), 3) else (1 / max(count, 1),) * count


@dataclass(frozen=True)
class KeypointSimilarity:
    """OKS of pairs of detections and objects, both with a field ``keypoints`` (n, K, 3) in px; the objects have ``area`` (m,) px² too.

    In float64 and in the order of operations of pycocotools.

    Attributes:
        sigmas: of each keypoint; () for :func:`default_sigmas`.
        by_box: whether an object without labelled keypoints is found by what lies in its box, doubled, as in pycocotools (which ignores
            such objects); else it is like nothing.
    """

    sigmas: Sequence[float] = ()
    by_box: bool = True

    def __call__(self, dets: Objects, truth: Objects, d: NDArray, g: NDArray) -> Array:
        """OKS (p,) of detections and objects with these row numbers (p,)."""
        found, there = dets.fields["keypoints"], truth.fields["keypoints"]
        sigmas = self.sigmas or default_sigmas(there.shape[1])
        variances = (np.asarray(sigmas, np.float64) * 2) ** 2
        parts = [np.zeros(0)]
        for start in range(0, len(d), PAIRS_AT_ONCE):
            rows, of = d[start : start + PAIRS_AT_ONCE], g[start : start + PAIRS_AT_ONCE]
            error = self._errors(found[rows, :, :2].astype(np.float64), there[of].astype(np.float64), truth.boxes_ltwh[of])
            error = error / variances / (truth.fields["area"][of, None] + np.spacing(1)) / 2
            labelled = np.asarray(there[of, :, 2] > 0)
            counted = labelled | ~labelled.any(axis=1, keepdims=True)
            likeness = (np.exp(-error) * counted).sum(axis=1) / counted.sum(axis=1)
            parts.append(likeness if self.by_box else likeness * labelled.any(axis=1))
        return np.concatenate(parts)

    @staticmethod
    def _errors(found: Array, there: Array, boxes_ltwh: Array) -> Array:
        """Squared distances (p, K) px², of objects without labelled keypoints those from the doubled box."""
        distance = found - there[..., :2]
        low, size = boxes_ltwh[:, None, :2], boxes_ltwh[:, None, 2:]
        outside = np.maximum(low - size - found, 0) + np.maximum(found - (low + 2 * size), 0)
        labelled = np.asarray((there[..., 2] > 0).any(axis=1, keepdims=True))
        errors: Array = (np.where(labelled[..., None], distance, outside) ** 2).sum(axis=2)
        return errors
