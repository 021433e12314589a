"""How far predictions of two networks differ: the largest difference of a box coordinate in px, and of a score."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from utils.types import Predictions


class PredictionDifference(NamedTuple):
    """Infinite where shapes differ or one side is NaN."""

    boxes_px: float
    scores: float

    @classmethod
    def largest(cls, differences: Iterable[PredictionDifference]) -> PredictionDifference:
        """The largest of several, boxes and scores each; zero for none."""
        differences = list(differences)
        return cls(max((d.boxes_px for d in differences), default=0.0), max((d.scores for d in differences), default=0.0))


def prediction_difference(expected: Predictions, got: Predictions, *, mean_boxes: bool = False) -> PredictionDifference:
    """Compares predictions candidate by candidate; what a task adds to candidates counts with the boxes.

    Args:
        expected, got: of the same images.
        mean_boxes: takes the mean over all coordinates instead of the largest.
    """
    if expected.boxes.shape != got.boxes.shape or expected.scores.shape != got.scores.shape:
        return PredictionDifference(math.inf, math.inf)
    px = absolute_difference(expected.boxes, got.boxes, mean=mean_boxes)
    for name, values in expected.fields.items():
        other = got.fields.get(name)
        same = other is not None and other.shape == values.shape
        px = max(px, absolute_difference(values, other, mean=mean_boxes) if same and other is not None else math.inf)
    return PredictionDifference(px, absolute_difference(expected.scores, got.scores))


def absolute_difference(expected: Tensor, got: Tensor, *, mean: bool = False) -> float:
    """The largest absolute difference of two tensors of one shape, or its mean; infinite for NaN, zero for empty ones."""
    if not expected.numel():
        return 0.0
    difference = (expected - got).abs().nan_to_num(nan=math.inf)
    return float(difference.mean() if mean else difference.max())


def matched_difference(expected: Predictions, got: Predictions) -> PredictionDifference:
    """Compares detections whatever their order, since equal scores may be sorted either way.

    Each box with a score above zero is matched with the one that is nearest in place, class and score.
    """
    worst = [PredictionDifference(0.0, 0.0)]
    for boxes_a, scores_a, boxes_b, scores_b in zip(expected.boxes, expected.scores, got.boxes, got.scores):
        a, b = scores_a.amax(dim=1) > 0, scores_b.amax(dim=1) > 0
        if a.sum() != b.sum():
            return PredictionDifference(math.inf, math.inf)
        if not a.any():
            continue
        px = (boxes_a[a][:, None] - boxes_b[b][None]).abs().amax(dim=2)  # (n, n)
        score = (scores_a[a][:, None] - scores_b[b][None]).abs().amax(dim=2)
        cost = (px + score).nan_to_num(nan=math.inf)
        for partner, dim in ((cost.argmin(dim=1, keepdim=True), 1), (cost.argmin(dim=0, keepdim=True), 0)):
            worst.append(PredictionDifference(float(px.gather(dim, partner).max()), float(score.gather(dim, partner).max())))
    return PredictionDifference.largest(worst)
