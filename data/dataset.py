"""From sample keys to a batch. A key holds image, epoch and shape; with the seed, these alone decide what a sample is.

Workers hold no state that matters: any of them, in any process, returns the same sample for the same key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from data.augment.colour import coloured, draw_factors, level_tables
from data.augment.flips import Flips
from data.augment.hyp import AugmentHyp
from data.augment.letterbox import letterbox
from data.augment.mixup import mixup
from data.augment.mosaic import mosaic_scene, render_view, single_scene
from data.images.pixels import fill_of
from data.images.reading import ImageError
from data.images.store import RECENT_BYTES, ImageStore
from data.labels.problems import Problem
from data.labels.table import LabelTable
from tasks import DETECT, Task
from tasks.base import targets_of_images
from utils.instances import Instances
from utils.types import Batch, Finish, Letterbox

SAMPLE_STREAM, ORDER_STREAM = 1, 2  # so that no sample shares its random numbers with the order of an epoch


@dataclass(frozen=True)
class SampleKey:
    """Everything, beside the seed, that decides what a sample is.

    Attributes:
        index: of the image.
        epoch: from 0.
        hw: of the batch, px.
        mosaic: whether mosaic (and with it mixup) may happen.
        step_images: images of its batch over all processes; 0: the sample is not counted, and has no objects.
        repeat: how often the epoch has drawn the image before.
        window: images among which its mosaic finds partners; one of them is the image itself.
    """

    index: int
    epoch: int
    hw: tuple[int, int]
    mosaic: bool
    step_images: int | None = None
    repeat: int = 0
    window: tuple[int, ...] = ()


class Sample(NamedTuple):
    """One image of a batch."""

    image: np.ndarray  # (H, W, C)
    targets: Mapping[str, Any]  # arrays with a row for every object, and what holds for all of them, as the task makes them
    scale_xy: tuple[float, float]
    pad_xy: tuple[float, float]
    flips: Flips = Flips()  # left to the device, and so is the colour
    factors: np.ndarray | None = None  # (3,) of hue, saturation and value


@dataclass(frozen=True)
class ImageOptions:
    """How the images of a data set are read and augmented.

    Attributes:
        imgsz: longer side of an image in px, and side of a mosaic.
        hyp: hyper-parameters of the augmentation.
        augment: whether to augment at all.
        seed: of the run.
        channels: of the images.
        dtype: of the images, ``np.uint8`` or ``np.uint16``.
        recent_bytes: of decoded images that each process keeps.
        flip_idx: for each keypoint the index of its left-right counterpart; None: each is its own.
        finish_on_device: leave colour and flips (8-bit RGB only) to the device; batches say what is left.
    """

    imgsz: int
    hyp: AugmentHyp
    augment: bool
    seed: int = 0
    channels: int = 3
    dtype: type[np.generic] = np.uint8
    recent_bytes: int = RECENT_BYTES
    flip_idx: tuple[int, ...] | None = None
    finish_on_device: bool = False


class ImageDataset(torch.utils.data.Dataset):
    """Images with their labels; ``__getitems__`` writes a whole batch straight into one tensor.

    Args:
        image_files: N images.
        table: their labels.
        options: how they are read and augmented.
        task: makes the targets of a batch.
    """

    def __init__(self, image_files: Sequence[str], table: LabelTable, options: ImageOptions, *, task: Task = DETECT) -> None:
        if len(image_files) != len(table):
            raise ValueError(f"{len(image_files)} images but labels of {len(table)}")
        self.image_files = tuple(image_files)
        self.table, self.options, self.task = table, options, task
        self.store = ImageStore(
            image_files, imgsz=options.imgsz, channels=options.channels, dtype=options.dtype, smooth=not options.augment,
            recent_bytes=options.recent_bytes, cover=task.whole_image,
        )  # fmt: skip
        self._unreadable: dict[int, str] = {}  # of the current batch

    def __len__(self) -> int:
        return len(self.image_files)

    @property
    def imgsz(self) -> int:
        """Longer side of an image in px."""
        return self.options.imgsz

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
        image_wh = np.repeat(self.shapes_hw[:, ::-1], self.table.counts, axis=0).astype(np.float32)
        return torch.from_numpy(self.table.boxes_cxcywh[:, 2:].copy()), torch.from_numpy(image_wh)

    def original(self, path: str) -> np.ndarray:
        """(H, W, C) an image at its own size. Raises ImageError if its file has become unreadable since."""
        return self.store.original(path)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything wrong that was found when reading, also about images that were left out."""
        return self.table.problems

    def __getitem__(self, key: SampleKey) -> Sample:
        return self._sample(key, np.empty((*key.hw, self.options.channels), self.options.dtype))

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        """A batch; images lie one after another in its tensor, channels last."""
        h, w = keys[0].hw
        self._unreadable = {}
        images = np.empty((len(keys), h, w, self.options.channels), self.options.dtype)
        samples = []
        for place, key in zip(images, keys):
            sample = self._sample(key, place)
            if key.step_images == 0:
                sample = sample._replace(targets={k: v[:0] if isinstance(v, np.ndarray) else v for k, v in sample.targets.items()})
            if sample.image is not place:
                np.copyto(place, sample.image)
            samples.append(sample._replace(image=sample.image[:0]))
        letterboxes = Letterbox(
            torch.from_numpy(self.table.shapes_hw[[k.index for k in keys]]),
            torch.tensor([s.scale_xy for s in samples], dtype=torch.float32),
            torch.tensor([s.pad_xy for s in samples], dtype=torch.float32),
        )
        targets = targets_of_images([s.targets for s in samples])
        max_boxes = max(len(s.targets["classes"]) for s in samples)
        paths = tuple(self.image_files[k.index] for k in keys)
        unreadable = tuple((self.image_files[i], reason) for i, reason in self._unreadable.items())
        return Batch(
            torch.from_numpy(images).permute(0, 3, 1, 2), targets, paths, letterboxes, max_boxes, unreadable, keys[0].step_images,
            finish=finish_of(samples) if self.options.finish_on_device else None, truth=None if self.options.augment else self._truth(keys),
        )  # fmt: skip

    def _truth(self, keys: Sequence[SampleKey]) -> Any:
        """The objects of a batch in px of the originals, where the task measures them by more than its targets say."""
        hws = [(int(h), int(w)) for h, w in self.table.shapes_hw[[k.index for k in keys]]]
        return self.task.exact_truth([(self.table.instances(k.index, hw=hw), hw) for k, hw in zip(keys, hws)])

    def _sample(self, key: SampleKey, place: np.ndarray) -> Sample:
        """One image; in ``place`` (H, W, C) where it can be drawn there."""
        if not self.options.augment:
            return self._letterboxed(key)
        return self._augmented(key, sample_generator(self.options.seed, key), place)

    def _letterboxed(self, key: SampleKey) -> Sample:
        image, instances = self._image(key.index)
        fitted = letterbox(image, key.hw, auto=False, scaleup=False)
        h0, w0 = self.table.shapes_hw[key.index]
        scale = (image.shape[1] / w0 * fitted.scale_xy[0], image.shape[0] / h0 * fitted.scale_xy[1])
        instances = instances.scaled(*fitted.scale_xy).shifted(*fitted.pad_xy)
        return Sample(fitted.image, self.task.targets(instances, key.hw), scale, fitted.pad_xy)

    def _augmented(self, key: SampleKey, rng: np.random.Generator, place: np.ndarray) -> Sample:
        hyp = self.options.hyp
        use_mosaic = key.mosaic and rng.random() < hyp.mosaic
        image, instances = self._mosaic(key, key.index, rng, place) if use_mosaic else self._single(key, rng, place)
        if use_mosaic and rng.random() < hyp.mixup:
            (index,) = draw_partners(key.window, key.index, 1, rng)
            other = self._mosaic(key, index, rng)
            image, instances = mixup((image, instances), other, rng)
        factors, flips = draw_factors(hyp, rng), Flips.draw(hyp, rng)
        targets = self.task.targets(flips.of_instances(instances, key.hw, flip_idx=self.options.flip_idx), key.hw)
        if self.options.finish_on_device:
            return Sample(image, targets, (1.0, 1.0), (0.0, 0.0), flips, factors)
        return Sample(flips.of_image(coloured(image, factors, out=image)), targets, (1.0, 1.0), (0.0, 0.0))

    def _mosaic(
        self, key: SampleKey, index: int, rng: np.random.Generator, place: np.ndarray | None = None
    ) -> tuple[np.ndarray, Instances]:
        """Image ``index`` and three others of the window, in any order."""
        members = rng.permutation([index, *draw_partners(key.window, index, 3, rng)])
        scene = mosaic_scene([self._image(int(i)) for i in members], self.options.imgsz, rng)
        return render_view(scene, key.hw, self.options.hyp, rng, flip_idx=self.options.flip_idx, out=place)

    def _single(self, key: SampleKey, rng: np.random.Generator, place: np.ndarray) -> tuple[np.ndarray, Instances]:
        scene = single_scene(*self._image(key.index), key.hw)
        return render_view(scene, key.hw, self.options.hyp, rng, flip_idx=self.options.flip_idx, out=place)

    def _image(self, index: int) -> tuple[np.ndarray, Instances]:
        """An image at training size with its objects in px; grey and without objects if its file has become unreadable since."""
        try:
            image = self.store.get(index)
        except ImageError as error:
            self._unreadable[index] = str(error)
            h, w = self.table.shapes_hw[index]
            ratio = self.options.imgsz / max(h, w)
            shape = (max(round(h * ratio), 1), max(round(w * ratio), 1), self.options.channels)
            image = np.full(shape, fill_of(self.options.dtype), self.options.dtype)
            instances = self.table.instances(index, hw=shape[:2])
            return image, instances.select(np.zeros(len(instances), bool))
        return image, self.table.instances(index, hw=image.shape[:2])


def sample_generator(seed: int, key: SampleKey) -> np.random.Generator:
    """The random numbers of a sample."""
    repeat = (key.repeat,) if key.repeat else ()
    return np.random.default_rng((seed, key.epoch, key.index, SAMPLE_STREAM, *repeat))


def finish_of(samples: Sequence[Sample]) -> Finish:
    """What is left to do to the images of a batch."""
    tables = [level_tables(s.factors) for s in samples if s.factors is not None]
    return Finish(torch.tensor([s.flips for s in samples]), torch.from_numpy(np.stack(tables)) if tables else None)


def draw_partners(window: Sequence[int], index: int, count: int, rng: np.random.Generator) -> list[int]:
    """``count`` images of a window for a mosaic or mixup with image ``index``: others than it, all different, as far as there are any."""
    others = [i for i in window if i != index] or [index]
    return rng.choice(others, size=count, replace=len(others) < count).tolist()
