"""From a sample's key to its part of a batch. A key says which image, epoch and shape; with the seed, that is all that decides.

Workers hold no state that matters: any of them, in any process, gives the same sample for the same key.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from data.augment.colour import hsv
from data.augment.flips import flip
from data.augment.hyp import AugmentHyp
from data.augment.letterbox import letterbox
from data.augment.mixup import mixup
from data.augment.mosaic import mosaic_scene, single_scene, view
from data.images.pixels import fill_of, split_into
from data.images.reading import ImageError
from data.images.store import RECENT_BYTES, ImageStore
from data.labels.instances import Instances
from data.labels.yolo import LabelTable
from utils.types import Batch, Letterbox

SAMPLE_STREAM, ORDER_STREAM = 1, 2  # so that no sample shares its random numbers with the order of an epoch


class SampleKey(NamedTuple):
    """Everything, beside the seed, that decides what a sample looks like."""

    index: int  # of the image
    epoch: int
    hw: tuple[int, int]  # of the batch, px
    mosaic: bool  # whether mosaic (and with it mixup) may happen
    of_step: int | None = None  # images of its batch over all processes; 0: it stands for none, and has no objects
    repeat: int = 0  # times that the epoch has shown the image before


class Sample(NamedTuple):
    """One image of a batch."""

    image: np.ndarray  # (H, W, C)
    targets: np.ndarray  # (n, 5) float32 [class, cx, cy, w, h], normalised
    scale_xy: tuple[float, float]
    pad_xy: tuple[float, float]


class ImageDataset(torch.utils.data.Dataset):
    """Images with their labels; ``__getitems__`` draws a whole batch straight into one tensor.

    Args:
        image_files: N images.
        table: Their labels.
        imgsz: Longer side of an image in px, and side of a mosaic.
        hyp: Hyper-parameters of the augmentation.
        augment: Whether to augment at all.
        seed: Of the run.
        channels: Of the images.
        dtype: Of the images, ``np.uint8`` or ``np.uint16``.
        recent_bytes: Of decoded images that each process keeps.
    """

    def __init__(
        self,
        image_files: Sequence[str],
        table: LabelTable,
        *,
        imgsz: int,
        hyp: AugmentHyp,
        augment: bool,
        seed: int = 0,
        channels: int = 3,
        dtype: type[np.generic] = np.uint8,
        recent_bytes: int = RECENT_BYTES,
    ) -> None:
        if len(image_files) != len(table):
            raise ValueError(f"{len(image_files)} images but labels of {len(table)}")
        self.image_files = tuple(image_files)
        self.table = table
        self.imgsz, self.hyp, self.augment, self.seed = imgsz, hyp, augment, seed
        self.channels, self.dtype = channels, dtype
        self.store = ImageStore(
            image_files, imgsz=imgsz, channels=channels, dtype=dtype, smooth=not augment, recent_bytes=recent_bytes
        )  # fmt: skip
        self._unreadable: dict[int, str] = {}  # of the batch that is drawn

    def __len__(self) -> int:
        return len(self.image_files)

    @cached_property
    def labels(self) -> tuple[np.ndarray, ...]:
        """Per image (n, 5) float32 [class, cx, cy, w, h], normalised."""
        return tuple(self.table.array(i) for i in range(len(self)))

    @property
    def shapes_hw(self) -> np.ndarray:
        """(N, 2) int64 height and width of the originals in px."""
        return self.table.shapes_hw

    def box_sizes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all objects: width and height (M, 2), normalised, and width and height of their images (M, 2) px."""
        counts = torch.tensor([len(rows) for rows in self.labels])
        wh = np.concatenate([np.zeros((0, 2), np.float32), *(rows[:, 3:] for rows in self.labels)])
        return torch.from_numpy(wh), torch.from_numpy(self.shapes_hw[:, ::-1].copy()).float().repeat_interleave(counts, dim=0)

    def original(self, path: str) -> np.ndarray:
        """(H, W, C) an image at its own size. Raises ImageError if its file has become unreadable since."""
        return self.store.original(path)

    @property
    def problems(self) -> tuple:
        """Everything wrong that was found when reading, also about images that were left out."""
        return self.table.problems

    def __getitem__(self, key: SampleKey) -> Sample:
        repeat = (key.repeat,) if key.repeat else ()
        rng = np.random.default_rng((self.seed, key.epoch, key.index, SAMPLE_STREAM, *repeat))
        if self.augment:
            return self._augmented(key, rng)
        image, instances = self._image(key.index)
        boxed = letterbox(image, key.hw, auto=False, scaleup=False)
        h0, w0 = self.table.shapes_hw[key.index]
        scale = (image.shape[1] / w0 * boxed.scale_xy[0], image.shape[0] / h0 * boxed.scale_xy[1])
        instances = instances.scaled(*boxed.scale_xy).shifted(*boxed.pad_xy)
        return Sample(boxed.image, _targets(instances, key.hw), scale, boxed.pad_xy)

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        """A batch; images are split into planes directly in its tensor."""
        h, w = keys[0].hw
        self._unreadable = {}
        images = np.empty((len(keys), self.channels, h, w), self.dtype)
        samples = []
        for planes, key in zip(images, keys):
            sample = self[key]
            if key.of_step == 0:
                sample = sample._replace(targets=sample.targets[:0])
            split_into(sample.image, planes)
            samples.append(sample._replace(image=sample.image[:0]))
        counts = [len(s.targets) for s in samples]
        owners = np.repeat(np.arange(len(keys), dtype=np.float32), counts)
        targets = np.concatenate((owners[:, None], np.concatenate([s.targets for s in samples])), 1)
        places = Letterbox(
            torch.from_numpy(self.table.shapes_hw[[k.index for k in keys]]),
            torch.tensor([s.scale_xy for s in samples], dtype=torch.float32),
            torch.tensor([s.pad_xy for s in samples], dtype=torch.float32),
        )
        paths = tuple(self.image_files[k.index] for k in keys)
        unreadable = tuple((self.image_files[i], reason) for i, reason in self._unreadable.items())
        return Batch(torch.from_numpy(images), torch.from_numpy(targets), paths, places, max(counts), unreadable, keys[0].of_step)

    def _augmented(self, key: SampleKey, rng: np.random.Generator) -> Sample:
        use_mosaic = key.mosaic and rng.random() < self.hyp.mosaic
        image, instances = self._mosaic(key, key.index, rng) if use_mosaic else self._single(key, rng)
        if use_mosaic and rng.random() < self.hyp.mixup:
            other = self._mosaic(key, int(rng.integers(len(self))), rng)
            image, instances = mixup((image, instances), other, rng)
        image = hsv(image, self.hyp, rng)
        image, instances = flip(image, instances, self.hyp, rng)
        return Sample(image, _targets(instances, key.hw), (1.0, 1.0), (0.0, 0.0))

    def _mosaic(self, key: SampleKey, index: int, rng: np.random.Generator) -> tuple[np.ndarray, Instances]:
        """Image ``index`` and three others, in any order."""
        members = rng.permutation([index, *rng.integers(len(self), size=3)])
        scene = mosaic_scene([self._image(int(i)) for i in members], self.imgsz, rng)
        return view(scene, key.hw, self.hyp, rng)

    def _single(self, key: SampleKey, rng: np.random.Generator) -> tuple[np.ndarray, Instances]:
        scene = single_scene(*self._image(key.index), key.hw)
        return view(scene, key.hw, self.hyp, rng)

    def _image(self, index: int) -> tuple[np.ndarray, Instances]:
        """An image at training size with its objects in px; grey and without objects if its file has become unreadable since."""
        try:
            image = self.store.get(index)
        except ImageError as error:
            self._unreadable[index] = str(error)
            h, w = self.table.shapes_hw[index]
            ratio = self.imgsz / max(h, w)
            shape = (max(round(h * ratio), 1), max(round(w * ratio), 1), self.channels)
            return np.full(shape, fill_of(self.dtype), self.dtype), Instances.empty()
        return image, self.table.instances(index, hw=image.shape[:2])


def _targets(instances: Instances, hw: tuple[int, int]) -> np.ndarray:
    """(n, 5) float32 [class, cx, cy, w, h], normalised to the batch image."""
    h, w = hw
    b = instances.boxes_xyxy / np.array((w, h, w, h), np.float32)
    return np.concatenate((instances.classes[:, None], (b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]), 1).astype(np.float32)
