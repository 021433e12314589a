"""From matched detections to average precision by three rules, and the curves over confidence.

The rules differ in what lies beyond the last recall that was reached. COCO counts nothing there, ultralytics next to nothing; YOLOv5 draws
a line from the last point to (recall 1, precision 0) and credits what is under it, so its numbers are higher for the same detections.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rule = Literal["coco", "yolov5", "ultralytics"]
RECALL_POINTS: Array = np.linspace(0, 1, 101)
CURVE_POINTS: Array = np.linspace(0, 1, 1000)
EPS = 1e-16


class Curves(NamedTuple):
    """Per class, at IoU 0.5: over 1000 confidences, and precision over 1000 recalls. Rows of absent classes are NaN."""

    confidence: Array  # (1000,)
    precision: Array  # (nc, 1000)
    recall: Array  # (nc, 1000)
    f1: Array  # (nc, 1000)
    recall_axis: Array  # (1000,)
    precision_at_recall: Array  # (nc, 1000)


def coco_average_precision(correct: NDArray[np.bool_], ignored: NDArray[np.bool_], positives: NDArray[np.int64]) -> tuple[Array, Array]:
    """COCO's average precision and the recall reached, of one class, for all thresholds and ranges of area.

    Args:
        correct: (n, T, A) in order of score.
        ignored: (n, T, A).
        positives: (A,) number of objects to be found.

    Returns:
        Average precision (T, A) and recall (T, A); NaN where there is nothing to be found.
    """
    thresholds, areas = correct.shape[1:]
    precision, recall = np.full((2, thresholds, areas), np.nan)
    for a in np.flatnonzero(positives):
        counted = np.cumsum(~ignored[:, :, a], axis=0, dtype=np.int64)  # (n, T)
        for t in range(thresholds):
            values, recall[t, a] = _interpolated(counted[correct[:, t, a], t], int(positives[a]))
            precision[t, a] = values.mean()
    return precision, recall


def trapezoid_average_precision(correct: NDArray[np.bool_], positives: int, *, credit_unreached: bool) -> Array:
    """Average precision of YOLOv5 and ultralytics: the area under 101 interpolated points, by trapezia.

    Args:
        correct: (n, T) detections of one class in order of score.
        positives: Number of objects to be found, at least 1.
        credit_unreached: Whether the curve goes straight from its last point to (recall 1, precision 0), as in YOLOv5, or first drops to 0.

    Returns:
        (T,)
    """
    hits, recall, precision = _counts(correct, positives)
    result = np.zeros(correct.shape[1])
    for t in range(correct.shape[1] if len(hits) else 0):
        drop = [] if credit_unreached else [recall[-1, t]]
        envelope = np.maximum.accumulate(np.r_[1.0, precision[:, t], np.zeros(len(drop) + 1)][::-1])[::-1]
        values = np.interp(RECALL_POINTS, np.r_[0.0, recall[:, t], drop, 1.0], envelope)
        result[t] = ((values[1:] + values[:-1]) / 2 * np.diff(RECALL_POINTS)).sum()
    return result


def confidence_curves(correct: NDArray[np.bool_], score: Array, positives: int) -> tuple[Array, Array, Array]:
    """Recall and precision over 1000 confidences and precision over 1000 recalls, of one class at one threshold.

    Above the best score precision is 1; of a class that was never detected everything is 0, precision too, as in YOLOv5 and ultralytics.

    Args:
        correct: (n,) in order of score.
        score: (n,) descending.
        positives: Number of objects, at least 1.
    """
    if not len(score):
        return np.zeros(1000), np.zeros(1000), np.zeros(1000)
    _, recall, precision = _counts(correct[:, None], positives)
    recall, precision = recall[:, 0], precision[:, 0]
    recall_at = np.interp(-CURVE_POINTS, -score, recall, left=0.0)
    precision_at = np.interp(-CURVE_POINTS, -score, precision, left=1.0)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.interp(CURVE_POINTS, np.r_[0.0, recall], np.r_[envelope[0], envelope], right=0.0)
    return recall_at, precision_at, reached


def smoothed(values: Array, fraction: float = 0.05) -> Array:
    """Mean over a window of about ``2 * fraction`` of the length, the ends continued; the length may grow by one."""
    width = round(len(values) * fraction * 2) // 2 + 1
    edge = np.ones(width // 2)
    padded = np.concatenate((edge * values[0], values, edge * values[-1]))
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _counts(correct: NDArray[np.bool_], positives: int) -> tuple[NDArray, Array, Array]:
    """Right ones so far (n, T), recall and precision."""
    hits = np.cumsum(correct, axis=0, dtype=np.float64)
    return hits, hits / (positives + EPS), hits / np.arange(1, len(hits) + 1)[:, None]


def _interpolated(counted: NDArray[np.int64], positives: int) -> tuple[Array, float]:
    """Precision at 101 recalls and the recall reached. ``counted``: for the k-th right detection, how many count up to it, itself included.

    Between right detections precision only falls, so the envelope at a recall is decided by the right ones alone.
    """
    found = np.arange(1, len(counted) + 1, dtype=np.float64)
    envelope = np.maximum.accumulate((found / (counted + np.spacing(1)))[::-1])[::-1]
    recall = found / positives
    at = np.searchsorted(recall, RECALL_POINTS, side="left")
    return np.append(envelope, 0.0)[np.minimum(at, len(envelope))], float(recall[-1]) if len(recall) else 0.0
