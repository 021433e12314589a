"""Flips: upside down and left-right."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from data.augment.hyp import AugmentHyp
from data.images.pixels import in_channel_groups
from utils.instances import Instances


def flip(
    image: np.ndarray, instances: Instances, hyp: AugmentHyp, rng: np.random.Generator, *, flip_idx: Sequence[int] | None = None
) -> tuple[np.ndarray, Instances]:
    """Upside down and left to right, each with its probability.

    Args:
        image: (H, W, C); not changed.
        instances: its objects.
        hyp: ``flipud`` and ``fliplr``.
        rng: the sample's generator.
        flip_idx: for each keypoint the index of its left-right counterpart; None: each is its own.
    """
    upside_down, mirrored = rng.random(2) < (hyp.flipud, hyp.fliplr)
    if not (upside_down or mirrored):
        return image, instances
    h, w = image.shape[:2]
    if upside_down:
        instances = instances.flipped(h)
    if mirrored:
        instances = instances.mirrored(w, flip_idx=flip_idx)
    axes = -1 if upside_down and mirrored else int(mirrored)
    return in_channel_groups(lambda part: cv2.flip(part, axes), image), instances
