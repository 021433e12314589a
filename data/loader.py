"""The one entry to the data: a dataset spec and a split in, batches out.

The order of an epoch and the look of every sample hang on (seed, epoch, index) alone, so the data are the same for any number of
workers, for any number of processes, and after a resume.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from data.augment.hyp import AugmentHyp
from data.dataset import ORDER_STREAM, ImageDataset, SampleKey
from data.dataset_spec import DatasetSpec
from data.images.depth import colour_note, depth_of
from data.images.store import RECENT_BYTES
from data.images.unreadable import UnreadableImages
from data.labels.source import split_labels
from data.labels.yolo import LabelTable, check_classes, label_path, list_images, summarise
from data.sampler import draw, image_weights
from utils.distributed import local_world_size
from utils.errors import UserError
from utils.types import Batch


def build_loader(
    spec: DatasetSpec,
    split: str,
    *,
    imgsz: int,
    batch_size: int,
    hyp: AugmentHyp,
    augment: bool,
    rect: bool = False,
    pad: float = 0.0,
    stride: int = 32,
    workers: int = 8,
    seed: int = 0,
    cache: str | None = None,
    single_cls: bool = False,
    min_items: int = 0,
    mosaic_until: int | None = None,
    shuffle: bool | None = None,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    whole_batches: bool = False,
    prefix: str = "",
) -> BatchLoader:
    """Reads the labels of a split (or their cache), says what is wrong with them, and returns its loader.

    Args:
        spec: From ``load_dataset_spec``.
        split: ``train``, ``val`` or ``test``.
        imgsz: Side of the network's input in px.
        batch_size: Images a batch, over all processes.
        hyp: Hyper-parameters of the augmentation.
        augment: Mosaic, mixup, warp, colour and flips; else letterbox only.
        rect: Batches of similar aspect ratio in the least shape that holds them; no mosaic then.
        pad: Strides added to rectangular shapes (validation: 0.5).
        stride: Of the model, in px; rectangular shapes are multiples of it.
        workers: Most worker processes (0: in this process).
        seed: Of the run.
        cache: ``ram``, ``disk`` or None.
        single_cls: Treat all classes as one.
        min_items: Leave out images with fewer objects.
        mosaic_until: The first epoch without mosaic, mixup and copy-paste (None: never).
        shuffle: Default: as ``augment``.
        rank: Of this process.
        world_size: Number of processes; each gets its part of every batch.
        drop_last: Leave out the last incomplete batch.
        whole_batches: Processes take whole batches in turn, not a part of each: to the last bit what one process computes.
        prefix: Words before messages and progress bars.

    Raises:
        UserError: Images missing, none usable, none labelled, or a class without a name.
    """
    files = list_images(spec.sources(split))
    talks = rank == 0
    table, remarks = split_labels(spec, split, files, workers=workers or 1, prefix=prefix, progress=talks)
    table = check_classes(table, files, spec.names if spec.label_nc == spec.nc else range(spec.label_nc), spec.yaml_path)
    if talks:
        print("\n".join((*remarks, summarise(table, prefix=prefix))))
    files, table = _usable(files, table, min_items, spec, split)
    if single_cls or spec.single_cls:
        table = table.as_one_class()
    recent_bytes = (RECENT_BYTES * 4 if augment else RECENT_BYTES) // max(workers, 4)  # a gigabyte, however many share it
    dtype = depth_of(files, channels=spec.ch, bits=spec.bits)
    if talks and augment and (note := colour_note(spec.ch, dtype, hyp)):
        print(f"{prefix}{note}")
    dataset = ImageDataset(
        files, table, imgsz=imgsz, hyp=hyp, augment=augment, seed=seed, channels=spec.ch, dtype=dtype, recent_bytes=recent_bytes
    )  # fmt: skip
    remark = _fill_cache(dataset, cache, processes=min(world_size, local_world_size()), prefix=prefix, progress=talks)
    if talks and remark:
        print(remark)
    sampler = EpochSampler(
        len(dataset), batch_size=batch_size, hw=(imgsz, imgsz), shuffle=augment if shuffle is None else shuffle, seed=seed,
        rank=rank, world_size=world_size, drop_last=drop_last, whole_batches=whole_batches, mosaic_until=0 if rect else mosaic_until,
        rect_shapes=_rect_shapes(table.shapes_hw, batch_size, imgsz, stride, pad) if rect else None,
    )  # fmt: skip
    return BatchLoader(dataset, sampler, workers=workers, seed=seed, prefix=prefix)


class BatchLoader:
    """Iterates over the batches of the epoch that was set last.

    Attributes:
        dataset: With ``labels``, ``image_files``, ``shapes_hw`` and ``problems``.
        sampler: Decides order and shapes.
    """

    def __init__(self, dataset: ImageDataset, sampler: EpochSampler, *, workers: int, seed: int, prefix: str = "") -> None:
        self.dataset, self.sampler = dataset, sampler
        self.unreadable = UnreadableImages(len(dataset), prefix=prefix)
        self.batch_size = sampler.batch_size
        workers = max(0, min(workers, os.cpu_count() or 1, len(sampler)))
        self._loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker if workers else None,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(seed),  # the global one stays untouched
        )

    def __iter__(self) -> Iterator[Batch]:
        """The batches; at the end, images that could not be read are named.

        Raises:
            UserError: too many could not.
        """
        for batch in self._loader:
            if batch.unreadable:
                self.unreadable.add(batch.unreadable)
            yield batch
        self.unreadable.report()

    def __len__(self) -> int:
        """Batches of a whole epoch, of this process."""
        return len(self.sampler)

    def set_epoch(self, epoch: int, start_batch: int = 0, *, class_ap: Sequence[float] | None = None) -> None:
        """Chooses what the next iteration yields: this epoch, from this batch on. Survives a resume, as nothing else decides.

        Args:
            class_ap: How well each class is found; images are drawn accordingly (``image_weights``). None: each is shown once.
        """
        self.sampler.epoch, self.sampler.start_batch = epoch, start_batch
        self.sampler.weights = None if class_ap is None else image_weights(self.dataset.table, class_ap)

    def close_mosaic(self) -> None:
        """No mosaic, mixup and copy-paste from the epoch that is set on; a run that knows its end passes ``mosaic_until`` instead."""
        self.sampler.mosaic_until = self.sampler.epoch

    def state(self, batches_done: int = 0) -> dict[str, int]:
        """What ``set_epoch`` needs to go on after ``batches_done`` batches of this epoch."""
        return {"epoch": self.sampler.epoch, "start_batch": batches_done}


class EpochSampler(Sampler):
    """Lists of sample keys, batch by batch, for one process.

    The batches, and with them their shapes, are the same for any number of processes; each takes its part of every batch, as even as can
    be, or whole batches in turn. A process for which the last ones leave no image repeats one that counts nowhere, so that all do as
    many steps.

    Args:
        count: Images.
        batch_size: Over all processes.
        hw: Shape of a batch in px.
        shuffle: Draw a new order every epoch.
        seed: Of the run.
        rank: Of this process.
        world_size: Number of processes.
        drop_last: Leave out the last incomplete batch.
        whole_batches: Processes take whole batches in turn.
        mosaic_until: First epoch without mosaic (None: never).
        rect_shapes: Order by aspect ratio (N,), and a shape (h, w) for each batch of it.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        hw: tuple[int, int],
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        whole_batches: bool = False,
        mosaic_until: int | None = None,
        rect_shapes: tuple[np.ndarray, list[tuple[int, int]]] | None = None,
    ) -> None:
        self.count, self.batch_size, self.hw, self.shuffle, self.seed = count, batch_size, hw, shuffle, seed
        self.rank, self.world_size, self.drop_last, self.whole_batches = rank, world_size, drop_last, whole_batches
        self.mosaic_until, self.rect_shapes = mosaic_until, rect_shapes
        self.epoch, self.start_batch = 0, 0
        self.weights: np.ndarray | None = None  # (N,) share of the draws of each image; None: each is shown once

    def __len__(self) -> int:
        batches = len(self._batches(np.arange(self.count)))
        return -(-batches // self.world_size) if self.whole_batches else batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        mosaic = self.mosaic_until is None or self.epoch < self.mosaic_until
        rng = np.random.default_rng((self.seed, self.epoch, 0, ORDER_STREAM))
        if self.weights is not None:
            batches = [(whole, self.hw) for whole in self._batches(draw(self.weights, rng))]
        elif self.rect_shapes is None:
            order = rng.permutation(self.count) if self.shuffle else np.arange(self.count)
            batches = [(whole, self.hw) for whole in self._batches(order)]
        else:
            order, shapes = self.rect_shapes
            batches = list(zip(self._batches(order), shapes))
            batches = [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches
        for indices, of_step, hw in list(self._share(batches))[self.start_batch :]:
            yield [SampleKey(int(i) % self.count, self.epoch, hw, mosaic, of_step, int(i) // self.count) for i in indices]

    def _batches(self, order: np.ndarray) -> list[np.ndarray]:
        """The batches of all processes."""
        size = self.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        return batches[:-1] if self.drop_last and len(batches) > 1 and len(batches[-1]) < size else batches

    def _share(self, batches: list[tuple[np.ndarray, tuple[int, int]]]) -> Iterator[tuple[np.ndarray, int, tuple[int, int]]]:
        """This process's images of every step, how many all processes have (0: this one has none that count), and their shape."""
        if self.whole_batches:
            for start in range(0, len(batches), self.world_size):
                step = batches[start : start + self.world_size]
                if self.rank < len(step):
                    yield step[self.rank][0], sum(len(whole) for whole, _ in step), step[self.rank][1]
                else:
                    yield step[0][0][:1], 0, step[0][1]
            return
        for whole, hw in batches:
            mine = np.array_split(whole, self.world_size)[self.rank]
            yield (mine, len(whole), hw) if len(mine) else (whole[:1], 0, hw)


def _usable(files: Sequence[str], table: LabelTable, min_items: int, spec: DatasetSpec, split: str) -> tuple[list[str], LabelTable]:
    """Without the images that cannot be used; at least one with an object must be left."""
    good = table.shapes_hw[:, 0] > 0
    if not good.any():
        raise UserError(f"{spec.yaml_path}: none of the {len(files)} images of {split!r} can be used, first: {table.problems[0]}")
    if not len(table.classes):
        expected = label_path(files[0])
        raise UserError(f"{spec.yaml_path}: no labels at all for the {len(files)} images of {split!r}, the first is expected at {expected}")
    good &= np.diff(table.starts) >= min_items
    if not good.any():
        raise UserError(f"{spec.yaml_path}: no image of {split!r} has --min-items {min_items} objects")
    return [f for f, g in zip(files, good) if g], table.take(good)


def _fill_cache(dataset: ImageDataset, cache: str | None, *, processes: int, prefix: str, progress: bool) -> str:
    """Caches the images as asked; returns one line for the user where that failed."""
    if not cache:
        return ""
    if cache == "ram":
        return dataset.store.keep_in_ram(processes=processes, prefix=prefix, progress=progress)
    if cache == "disk":
        return dataset.store.keep_on_disk(prefix=prefix, progress=progress)
    raise UserError(f"--cache {cache}: ram or disk is expected")


def _rect_shapes(shapes_hw: np.ndarray, batch: int, imgsz: int, stride: int, pad: float) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Images ordered by height over width, and the least shape, in whole strides, that holds each batch of them."""
    aspect = shapes_hw[:, 0] / shapes_hw[:, 1]
    order = np.argsort(aspect, kind="stable")
    shapes = []
    for start in range(0, len(order), batch):
        low, high = aspect[order[start]], aspect[order[min(start + batch, len(order)) - 1]]
        h, w = min(high, 1.0), min(1 / low, 1.0)
        shapes.append(tuple(int(np.ceil(side * imgsz / stride + pad)) * stride for side in (h, w)))
    return order, shapes


def _as_is(batch: Batch) -> Batch:
    return batch


def _start_worker(worker: int) -> None:
    """Workers are the parallelism; threads inside them would only get in each other's way.

    A stop that reaches the whole process group is for the main process to hear: workers go on until it has finished its step.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Heeds a SIGTERM of the main process and no other's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
