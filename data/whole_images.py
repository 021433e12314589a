"""Images with one class each: cropped at random in training, and at their centre in validation. The same keys, store and batches."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from data.augment.centre_crop import centre_crop
from data.augment.random_crop import RandomCrop
from data.dataset import ImageDataset, Sample, SampleKey, sample_generator


class WholeImageDataset(ImageDataset):
    """Images with one class each, for tasks with ``whole_image``; arguments as those of :class:`data.dataset.ImageDataset`."""

    @cached_property
    def _crops(self) -> dict[int, RandomCrop]:
        """By side in px; made in the process that uses it."""
        return {}

    def _sample(self, key: SampleKey, place: np.ndarray) -> Sample:
        image, instances = self._image(key.index)
        if not self.options.augment:
            return self._centred(key, image, self.task.targets(instances, key.hw))
        side = key.hw[0]
        if side not in self._crops:
            self._crops[side] = RandomCrop(self.options.hyp, side, channels=self.options.channels, dtype=self.options.dtype)
        out = self._crops[side](image, sample_generator(self.options.seed, key))
        return Sample(out, self.task.targets(instances, key.hw), (1.0, 1.0), (0.0, 0.0))

    def _centred(self, key: SampleKey, image: np.ndarray, targets: Mapping[str, Any]) -> Sample:
        cropped = centre_crop(image, key.hw)
        h0, w0 = self.table.shapes_hw[key.index]
        scale = (image.shape[1] / w0 * cropped.scale_xy[0], image.shape[0] / h0 * cropped.scale_xy[1])
        return Sample(cropped.image, targets, scale, (float(cropped.pad_xy[0]), float(cropped.pad_xy[1])))
