"""Flips: upside down and left-right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from data.augment.hyp import AugmentHyp
from data.images.pixels import in_channel_groups
from utils.instances import Instances


class Flips(NamedTuple):
    """What happens to one image."""

    upside_down: bool = False
    mirrored: bool = False  # left to right

    @staticmethod
    def draw(hyp: AugmentHyp, rng: np.random.Generator) -> Flips:
        """Each with its probability, ``flipud`` and ``fliplr``."""
        return Flips(*(rng.random(2) < (hyp.flipud, hyp.fliplr)).tolist())

    def of_image(self, image: np.ndarray) -> np.ndarray:
        """The image (H, W, C), flipped; it is not changed."""
        if not any(self):
            return image
        axes = -1 if all(self) else int(self.mirrored)
        return in_channel_groups(lambda part: cv2.flip(part, axes), image)

    def of_instances(self, instances: Instances, hw: tuple[int, int], *, flip_idx: Sequence[int] | None = None) -> Instances:
        """Objects of an image of ``hw`` px, flipped; ``flip_idx`` is for their keypoints."""
        if self.upside_down:
            instances = instances.flipped(hw[0], flip_idx=flip_idx)
        return instances.mirrored(hw[1], flip_idx=flip_idx) if self.mirrored else instances


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
    flips = Flips.draw(hyp, rng)
    return flips.of_image(image), flips.of_instances(instances, (image.shape[0], image.shape[1]), flip_idx=flip_idx)
