"""How much AP depends on which images the validation set happens to hold: a bootstrap over images, for the same weights.

Every resample draws as many images as there are, with replacement; AP is computed anew from the matched detections of the images drawn, by
COCO's rule and by what the headline number compares: boxes, polygons, masks or keypoints. Matching is done once, as no image depends on
another. A detection of an image that was drawn w times counts w times; as copies of one detection have one score, this equals the AP of a
data set in which the image is there w times.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from utils.metrics.average_precision import RECALL_POINTS, Array
from utils.metrics.matching import AREA_RANGES, IOU_THRESHOLDS, match_coco, rank_in_group
from utils.metrics.metrics import MetricAccumulator
from utils.metrics.paired import PairedAccumulator

RESAMPLES = 200  # the standard deviation is known to 5 %; COCO's 5,000 images take some seconds
VALUES_AT_ONCE = 4_000_000  # of an array


def image_noise(metric: MetricAccumulator, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, float]:
    """Standard deviation of mAP over resampled images, by the names of results.csv; of two measures, of the task's own.

    Args:
        metric: has collected a data set; by another rule than COCO's, or of fewer than two images, nothing is measured.
        resamples: number of data sets that are drawn.
        seed: of the draw.
    """
    images = len(metric.state()["images"])
    if metric.rule != "coco" or images < 2:
        return {}
    ap = resampled_ap(metric, draw_images(images, resamples, seed=seed))  # (B, nc, T)
    with np.errstate(invalid="ignore"):
        mark = f"({metric.mark})" if isinstance(metric, PairedAccumulator) else ""
        means = {f"metrics/mAP_0.5{mark}": _class_mean(ap[:, :, :1]), f"metrics/mAP_0.5:0.95{mark}": _class_mean(ap)}
    return {name: float(values.std(ddof=1)) for name, values in means.items() if len(values) > 1}


def draw_images(images: int, resamples: int, *, seed: int) -> NDArray[np.int64]:
    """How often each image is in each resample, (B, images)."""
    generator = np.random.default_rng(seed)
    return np.stack([np.bincount(generator.integers(images, size=images), minlength=images) for _ in range(resamples)])


def resampled_ap(metric: MetricAccumulator, counts: NDArray[np.int64]) -> Array:
    """Average precision (B, nc, T) of every resample by COCO's rule; NaN of a class without objects in it.

    Args:
        metric: has collected the data set.
        counts: (B, images) how often each image is in each resample, images in the order of their names.
    """
    dets, truth, similarity, rule = metric.compared()
    nc = len(metric.names)
    dets = dets.take(rank_in_group(dets.image * nc + dets.label) < rule.limits[-1])
    match = match_coco(dets, truth, areas=AREA_RANGES[:1], similarity=similarity)
    truth = truth.take(~truth.crowd & (truth.area >= AREA_RANGES[0, 0]) & (truth.area <= AREA_RANGES[0, 1]))
    ap = np.full((len(counts), nc, len(IOU_THRESHOLDS)), np.nan)
    order = np.lexsort((-dets.score, dets.label))
    bounds = np.searchsorted(dets.label[order], np.arange(nc + 1))
    for c in np.unique(truth.label):
        rows = order[bounds[c] : bounds[c + 1]]
        objects = np.bincount(truth.image[truth.label == c], minlength=counts.shape[1])
        step = max(1, VALUES_AT_ONCE // max(len(rows), 1))
        for start in range(0, len(counts), step):
            part = counts[start : start + step]
            correct, ignored = match.correct[rows, :, 0], match.ignored[rows, :, 0]
            ap[start : start + step, c] = _weighted_ap(part[:, dets.image[rows]], correct, ignored, part @ objects)
    return ap


def _weighted_ap(weights: NDArray[np.int64], correct: NDArray[np.bool_], ignored: NDArray[np.bool_], positives: NDArray[np.int64]) -> Array:
    """Average precision (B, T) of one class.

    Args:
        weights: (B, n) how often each detection counts, in order of score.
        correct: (n, T).
        ignored: (n, T).
        positives: (B,) objects to be found.
    """
    result = np.full((len(weights), correct.shape[1]), np.nan)
    counted = None if ignored.any() else np.cumsum(weights, axis=1)
    for t in range(correct.shape[1]):
        right = np.flatnonzero(correct[:, t])
        all_counted = np.cumsum(weights * ~ignored[:, t], axis=1) if counted is None else counted
        found = np.cumsum(weights[:, right], axis=1)  # (B, r)
        precision = found / (all_counted[:, right] + np.spacing(1))
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        envelope = np.concatenate((envelope, np.zeros((len(weights), 1))), axis=1)
        for b in np.flatnonzero(positives):
            at = np.searchsorted(found[b] / positives[b], RECALL_POINTS, side="left")
            result[b, t] = envelope[b, at].mean()
    return result


def _class_mean(ap: Array) -> Array:
    """Mean over classes and thresholds of every resample (B, nc, T), classes without objects left out; resamples without any too."""
    known = ~np.isnan(ap)
    count = known.sum(axis=(1, 2))
    total = np.where(known, ap, 0).sum(axis=(1, 2))
    return total[count > 0] / count[count > 0]
