"""Mixup: two images blended, the objects of both (Zhang et al., arXiv 1710.09412)."""

from __future__ import annotations

import numpy as np

from data.images.pixels import blended
from utils.instances import Instances, concatenate


def mixup(
    first: tuple[np.ndarray, Instances], second: tuple[np.ndarray, Instances], rng: np.random.Generator
) -> tuple[np.ndarray, Instances]:
    """Two images of one size blended, the objects of both (Zhang et al., arXiv 1710.09412), with a weight from Beta(32, 32)."""
    ratio = rng.beta(32.0, 32.0)
    return blended(first[0], second[0], ratio), concatenate((first[1], second[1]))
