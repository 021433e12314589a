"""The confusion matrix of a detector: what was predicted where something was, with a row and a column for background."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from utils.metrics.matching import Objects, Similarity, box_overlap, overlapping_pairs

CONFIDENCE, IOU = 0.25, 0.45


def confusion_matrix(
    dets: Objects, truth: Objects, *, nc: int, conf: float = CONFIDENCE, iou: float = IOU, similarity: Similarity = box_overlap
) -> NDArray[np.int64]:
    """Counts (nc + 1, nc + 1): row what was predicted, column what was there, the last one background.

    Detections above ``conf`` and objects of one image are paired whatever their classes: a detection with the object that it overlaps most,
    an object with the best overlap of those. Every other object was missed, every other detection is background taken for its class; that
    holds for images without any pair as well (YOLOv5 and v9 leave the detections of those out). Crowds are in none of it, nor is a
    detection that lies in a crowd of its class and found no object.
    """
    dets = dets.take(dets.score > conf)
    crowds, truth = truth.take(truth.crowd), truth.take(~truth.crowd)
    pairs = overlapping_pairs(dets, truth, at_least=iou, across_classes=True, similarity=similarity)
    order = np.lexsort((-pairs.iou, pairs.det))
    favourite = order[np.unique(pairs.det[order], return_index=True)[1]]
    order = favourite[np.lexsort((-pairs.iou[favourite], pairs.truth[favourite]))]
    pair = order[np.unique(pairs.truth[order], return_index=True)[1]]
    predicted, there = dets.label[pairs.det[pair]], truth.label[pairs.truth[pair]]
    in_crowd = overlapping_pairs(dets, crowds, at_least=iou, similarity=similarity).det
    alone = np.delete(dets.label, np.union1d(pairs.det[pair], in_crowd))
    missed = np.delete(truth.label, pairs.truth[pair])
    row = np.concatenate((predicted, alone, np.full(len(missed), nc)))
    column = np.concatenate((there, np.full(len(alone), nc), missed))
    return np.bincount(row * (nc + 1) + column, minlength=(nc + 1) ** 2).reshape(nc + 1, nc + 1)
