"""Copy-paste: mirrored copies of objects with polygons (Ghiasi et al., arXiv 2012.07177)."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from utils.instances import Instances, concatenate


def copy_paste(
    image: np.ndarray, instances: Instances, probability: float, rng: np.random.Generator, *, flip_idx: Sequence[int] | None = None
) -> tuple[np.ndarray, Instances]:
    """Pastes mirrored copies of objects with polygons where they hide less than 30 % of any other (Ghiasi et al., arXiv 2012.07177).

    Args:
        image: (H, W, C); not changed.
        instances: its objects.
        probability: part of the objects with polygons of which a copy is tried.
        rng: the sample's generator.
        flip_idx: for each keypoint the index of its left-right counterpart; None: each is its own.
    """
    polygonal = np.flatnonzero(instances.counts > 0)
    tried = rng.permutation(polygonal)[: round(probability * len(polygonal))]
    if not len(tried):
        return image, instances
    chosen = np.zeros(len(instances.counts), bool)
    chosen[tried] = True
    copies = instances.select(chosen).mirrored(image.shape[1], flip_idx=flip_idx)
    kept = _select_uncovering(instances.boxes_xyxy, copies.boxes_xyxy)
    if not kept.any():
        return image, instances
    copies = copies.select(kept)
    mask = np.zeros(image.shape[:2], np.uint8)
    for rings in copies.outlines():  # object by object: filled together, overlaps would be holes
        cv2.fillPoly(mask, [np.round(ring).astype(np.int32) for ring in rings], 1)  # type: ignore[call-overload]
    image = np.where(mask[:, :, None] > 0, image[:, ::-1], image)
    return image, concatenate((instances, copies))


def _select_uncovering(boxes_xyxy: np.ndarray, copies_xyxy: np.ndarray) -> np.ndarray:
    """Which copies (m,) to paste, one after another, so that each covers less than 30 % of every box and of every copy before it."""
    everything = np.concatenate((boxes_xyxy, copies_xyxy))
    low = np.maximum(everything[None, :, :2], copies_xyxy[:, None, :2])
    high = np.minimum(everything[None, :, 2:], copies_xyxy[:, None, 2:])
    covered = (high - low).clip(0).prod(2) / ((everything[:, 2:] - everything[:, :2]).prod(1) + 1e-16)  # (m, n + m)
    n, kept = len(boxes_xyxy), np.zeros(len(copies_xyxy), bool)
    present = np.concatenate((np.ones(n, bool), kept))
    for i in range(len(copies_xyxy)):  # each choice depends on those before
        kept[i] = present[n + i] = bool((covered[i, present] < 0.3).all())
    return kept
