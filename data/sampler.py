"""The order of an epoch: which images, in which batches and shapes, each process has; and how often an image is drawn.

The order depends on (seed, epoch) alone, and every process derives its share from the same whole batches. Mosaic and mixup combine images
that are close to each other in it, so that a process decodes an image once for all samples that show it; images of a set that every
process can keep are combined freely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from data.dataset import ORDER_STREAM, SampleKey
from data.labels.table import LabelTable
from utils.errors import UserError

WINDOW = 16  # images, consecutive in an epoch's order, among which mosaics find partners: those of a usual batch
RectShapes = tuple[np.ndarray, list[tuple[int, int]]]  # order of N images, and height and width in px of each batch of them


@dataclass(frozen=True)
class SamplerOptions:
    """What decides the batches of an epoch.

    Attributes:
        batch_size: over all processes.
        hw: shape of a batch in px.
        shuffle: draw a new order every epoch.
        seed: of the run.
        rank: of this process.
        world_size: number of processes.
        whole_batches: processes take whole batches in turn, not a part of each.
        mosaic_until: first epoch without mosaic (None: never).
        partners_of_all: mosaic and mixup take their partners from the whole epoch, not from a window of it.
    """

    batch_size: int
    hw: tuple[int, int]
    shuffle: bool
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    whole_batches: bool = False
    mosaic_until: int | None = None
    partners_of_all: bool = False


class EpochSampler(Sampler):
    """Lists of sample keys, batch by batch, for one process.

    The batches, and with them their shapes, are the same for any number of processes; each takes its part of every batch, as even as
    possible, or whole batches in turn. A process for which the last ones leave no image repeats one that is not counted, so that all
    processes do the same number of steps.

    Args:
        count: N images.
        options: what decides the batches.
        rect_shapes: order of the images by aspect ratio, and a shape for each batch of it; None: all batches have ``options.hw``.

    Attributes:
        epoch: the epoch that the next iteration yields.
        start_batch: its first batch.
        weights: (N,) share of the draws of each image; None: each is drawn once.
    """

    def __init__(self, count: int, options: SamplerOptions, *, rect_shapes: RectShapes | None = None) -> None:
        self.count, self.options, self.rect_shapes = count, options, rect_shapes
        self.epoch, self.start_batch = 0, 0
        self.weights: np.ndarray | None = None

    def __len__(self) -> int:
        """Batches of a whole epoch, of this process."""
        batches = -(-self.count // self.options.batch_size)
        return -(-batches // self.options.world_size) if self.options.whole_batches else batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        until = self.options.mosaic_until
        mosaic = until is None or self.epoch < until
        batches = self._batches()
        order = np.concatenate([indices for indices, _ in batches])
        windows = self._windows(order % self.count) if mosaic else [()]
        places = np.split(np.arange(len(order)), np.cumsum([len(indices) for indices, _ in batches])[:-1])
        shares = self._share([(mine, hw) for mine, (_, hw) in zip(places, batches)])
        for mine, step_images, hw in list(shares)[self.start_batch :]:
            drawn = [(*divmod(int(order[p]), self.count), windows[min(p // WINDOW, len(windows) - 1)]) for p in mine]
            yield [SampleKey(index, self.epoch, hw, mosaic, step_images, repeat, window) for repeat, index, window in drawn]

    def _windows(self, order: np.ndarray) -> list[tuple[int, ...]]:
        return [tuple(order.tolist())] if self.options.partners_of_all else windows_of(order)

    def _batches(self) -> list[tuple[np.ndarray, tuple[int, int]]]:
        """The batches of all processes, each with its shape."""
        rng = np.random.default_rng((self.options.seed, self.epoch, 0, ORDER_STREAM))
        if self.rect_shapes is not None and self.weights is None:
            order, shapes = self.rect_shapes
            batches = list(zip(self._split(order), shapes))
            return [batches[i] for i in rng.permutation(len(batches))] if self.options.shuffle else batches
        if self.weights is not None:
            order = draw(self.weights, rng)
        else:
            order = rng.permutation(self.count) if self.options.shuffle else np.arange(self.count)
        return [(indices, self.options.hw) for indices in self._split(order)]

    def _split(self, order: np.ndarray) -> list[np.ndarray]:
        size = self.options.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _share(self, batches: list[tuple[np.ndarray, tuple[int, int]]]) -> Iterator[tuple[np.ndarray, int, tuple[int, int]]]:
        """This process's places in the order, step by step; how many all processes have (0: this one's are not counted); their shape."""
        rank, world_size = self.options.rank, self.options.world_size
        if self.options.whole_batches:
            for start in range(0, len(batches), world_size):
                step = batches[start : start + world_size]
                if rank < len(step):
                    yield step[rank][0], sum(len(whole) for whole, _ in step), step[rank][1]
                else:
                    yield step[0][0][:1], 0, step[0][1]
            return
        for whole, hw in batches:
            mine = np.array_split(whole, world_size)[rank]
            yield (mine, len(whole), hw) if len(mine) else (whole[:1], 0, hw)


def windows_of(order: np.ndarray) -> list[tuple[int, ...]]:
    """The order of an epoch (N,) in windows of ``WINDOW`` images; the last one also holds those that fill none.

    They depend neither on the batch size nor on the number of processes, so neither do the mosaics.
    """
    starts = range(0, max(len(order) - WINDOW, 0) + 1, WINDOW)
    return [tuple(order[start : start + WINDOW if start + 2 * WINDOW <= len(order) else None].tolist()) for start in starts]


def rectangular_shapes(shapes_hw: np.ndarray, *, batch_size: int, imgsz: int, stride: int, pad: float) -> RectShapes:
    """Images ordered by height over width, and the least shape, in whole strides, that holds each batch of them.

    Args:
        shapes_hw: (N, 2) px.
        batch_size: images a batch.
        imgsz: longer side of a shape in px, before padding.
        stride: of the model in px.
        pad: strides added.
    """
    aspect = shapes_hw[:, 0] / shapes_hw[:, 1]
    order = np.argsort(aspect, kind="stable")
    shapes = []
    for start in range(0, len(order), batch_size):
        low, high = aspect[order[start]], aspect[order[min(start + batch_size, len(order)) - 1]]
        h, w = (int(np.ceil(side * imgsz / stride + pad)) * stride for side in (min(high, 1.0), min(1 / low, 1.0)))
        shapes.append((h, w))
    return order, shapes


def image_weights(table: LabelTable, class_ap: Sequence[float]) -> np.ndarray:
    """The share (N,) of the draws that each image gets; they sum to 1.

    The weight of an image is the sum over its objects of (1 - AP_c)² / objects of class c, as in YOLOv5. Images without objects are not
    drawn.

    Args:
        table: labels of N images.
        class_ap: mAP@0.5:0.95 of each class; NaN (not measured) counts as the mean of the others, or as 0.

    Raises:
        UserError: no image would be drawn.
    """
    ap = np.asarray(class_ap, dtype=np.float64)
    measured = ap[~np.isnan(ap)]
    ap = np.where(np.isnan(ap), measured.mean() if len(measured) else 0.0, ap)
    objects = np.bincount(table.classes, minlength=len(ap))
    weights = (1 - ap) ** 2 / np.maximum(objects, 1)
    so_far = np.concatenate(([0.0], np.cumsum(weights[table.classes])))
    images = np.maximum(so_far[table.starts[1:]] - so_far[table.starts[:-1]], 0.0) * (np.diff(table.starts) > 0)
    if not images.sum() > 0:
        if not len(table.classes):
            raise UserError("--image-weights: no training image has an object; leave it out")
        images = np.diff(table.starts).astype(np.float64)  # AP is 1 for every class
    return images / images.sum()


def draw(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws N of N images (N,) with repeats. Image i drawn for the (k + 1)-th time is ``k * N + i``, and augmented differently."""
    count = len(weights)
    drawn = rng.choice(count, size=count, p=weights)
    order = np.argsort(drawn, kind="stable")
    of_equal = drawn[order]
    first = np.searchsorted(of_equal, of_equal)
    repeats = np.empty(count, dtype=np.int64)
    repeats[order] = np.arange(count) - first
    return drawn + repeats * count
