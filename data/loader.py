"""From a dataset spec and a split to batches.

The order of an epoch and the augmentation of every sample depend on (seed, epoch, index) alone, so the data are the same for any number
of workers, for any number of processes, and after a resume.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.augment.colour import colour_note
from data.augment.hyp import AugmentHyp, AugmentValues
from data.augment.random_crop import unused_note
from data.dataset import ImageDataset, ImageOptions
from data.dataset_spec import DatasetSpec
from data.images.depth import depth_of
from data.images.store import RECENT_BYTES
from data.images.unreadable import UnreadableImages
from data.labels.checks import check_classes, summarise
from data.labels.class_folders import has_class_folders
from data.labels.files import label_path, list_images
from data.labels.source import split_labels
from data.labels.table import LabelTable
from data.sampler import WINDOW, EpochSampler, SamplerOptions, image_weights, rectangular_shapes
from data.whole_images import WholeImageDataset
from data.workers import WORKER_DEATHS, start_worker
from tasks import DETECT, Task
from utils.distributed import local_world_size
from utils.errors import UserError
from utils.types import Batch


@dataclass(frozen=True)
class LoaderOptions:
    """How a split becomes batches.

    Attributes:
        imgsz: side of the network's input in px.
        batch_size: images a batch, over all processes.
        hyp: hyper-parameters of the augmentation.
        augment: shuffle, mosaic, mixup, warp, colour and flips; else letterbox only, in order.
        rect: batches of similar aspect ratio in the least shape that holds them; no mosaic then.
        pad: strides added to rectangular shapes (validation: 0.5).
        stride: of the model, in px; rectangular shapes are multiples of it.
        workers: most worker processes (0: in this process).
        seed: of the run.
        cache: ``ram``, ``disk`` or None.
        single_cls: treat all classes as one.
        min_items: leave out images with fewer objects.
        mosaic_until: the first epoch without mosaic, mixup and copy-paste (None: never).
        rank: of this process.
        world_size: number of processes; each gets its part of every batch.
        whole_batches: processes take whole batches in turn, not a part of each: bit for bit what one process computes.
        finish_on_device: leave colour and flips of 8-bit RGB images to ``data.augment.on_device.finished``.
        prefix: words before messages and progress bars.
    """

    imgsz: int
    batch_size: int
    hyp: AugmentHyp
    augment: bool
    rect: bool = False
    pad: float = 0.0
    stride: int = 32
    workers: int = 8
    seed: int = 0
    cache: str | None = None
    single_cls: bool = False
    min_items: int = 0
    mosaic_until: int | None = None
    rank: int = 0
    world_size: int = 1
    whole_batches: bool = False
    finish_on_device: bool = False
    prefix: str = ""


def build_loader(spec: DatasetSpec, split: str, options: LoaderOptions, *, task: Task = DETECT) -> BatchLoader:
    """Reads the labels of a split (or their cache), prints what is wrong with them, and returns its loader.

    Args:
        spec: from ``load_dataset_spec``.
        split: ``train``, ``val`` or ``test``.
        options: how the split becomes batches.
        task: reads label rows and makes the targets of a batch.

    Raises:
        UserError: images missing, none usable, none labelled, or a class without a name.
    """
    task = task.for_labels(spec.label_settings, source=str(spec.yaml_path))
    if task.whole_image:  # of one shape, and nothing in them that could be moved
        options = replace(options, rect=False, mosaic_until=0, finish_on_device=False)
    files, table = _read_split(spec, split, options, task)
    options = _without_flips(spec, table, options)
    dtype = depth_of(files, channels=spec.ch, bits=spec.bits)
    notes = (colour_note(spec.ch, dtype, options.hyp), unused_note(options.hyp) if task.whole_image else "")
    for note in notes if options.rank == 0 and options.augment else ():
        print(f"{options.prefix}{note}" if note else "", end="\n" if note else "")
    bytes_per_pixel = spec.ch * np.dtype(dtype).itemsize
    images = ImageOptions(
        imgsz=options.imgsz,
        hyp=options.hyp,
        augment=options.augment,
        seed=options.seed,
        channels=spec.ch,
        dtype=dtype,
        recent_bytes=_recent_bytes(options, count=len(table), bytes_per_pixel=bytes_per_pixel),
        flip_idx=spec.flip_idx,
        finish_on_device=options.finish_on_device and options.augment and spec.ch == 3 and dtype == np.uint8,
    )
    kind = WholeImageDataset if task.whole_image else ImageDataset
    dataset = kind(files, table, images, task=task.configured(options.hyp))
    _fill_cache(dataset, options)
    sampler = _build_sampler(table, options, bytes_per_pixel=bytes_per_pixel)
    return BatchLoader(dataset, sampler, workers=options.workers, seed=options.seed, prefix=options.prefix)


def _without_flips(spec: DatasetSpec, table: LabelTable, options: LoaderOptions) -> LoaderOptions:
    """Options without flips where keypoints have no ``flip_idx``: a mirrored left hand would be labelled as a left hand."""
    hyp = options.hyp
    if not options.augment or table.keypoints is None or spec.flip_idx is not None or not (hyp.flipud or hyp.fliplr or hyp.copy_paste):
        return options
    if options.rank == 0:
        print(f"{options.prefix}flips and copy-paste are off: {spec.yaml_path} has keypoints and no flip_idx, the counterpart of each")
    return replace(options, hyp=AugmentValues.of(hyp, flipud=0.0, fliplr=0.0, copy_paste=0.0))


def _recent_bytes(options: LoaderOptions, *, count: int, bytes_per_pixel: int) -> int:
    """Of the cache of each worker: a gigabyte over all of them in training, but at least the images of a window or of a small set."""
    if not options.augment:
        return RECENT_BYTES // max(options.workers, 4)
    image_bytes = options.imgsz**2 * bytes_per_pixel
    needed = count if is_small(count, image_bytes=image_bytes) else WINDOW
    return max(4 * RECENT_BYTES // max(options.workers, 4), needed * image_bytes)


def is_small(count: int, *, image_bytes: int) -> bool:
    """Whether every worker can keep all images of a set decoded, so that mosaics need no window. Depends on set and --imgsz alone."""
    return count * image_bytes <= RECENT_BYTES


class BatchLoader:
    """Iterates over the batches of the epoch that was set last.

    Attributes:
        dataset: with ``labels``, ``image_files``, ``shapes_hw`` and ``problems``.
        sampler: decides order and shapes.
    """

    def __init__(self, dataset: ImageDataset, sampler: EpochSampler, *, workers: int, seed: int, prefix: str = "") -> None:
        self.dataset, self.sampler = dataset, sampler
        self.unreadable = UnreadableImages(len(dataset), prefix=prefix)
        self.batch_size = sampler.options.batch_size
        workers = max(0, min(workers, os.cpu_count() or 1, len(sampler)))
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker if workers else None,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(seed),  # the global one stays untouched
        )

    def __iter__(self) -> Iterator[Batch]:
        """The batches; at the end, images that could not be read are reported.

        Raises:
            UserError: too many could not be read.
            RuntimeError: of torch: a worker was killed.
        """
        with WORKER_DEATHS.reported():
            batches = iter(self._loader)
        if self._loader.num_workers:
            WORKER_DEATHS.delay()
        while True:
            with WORKER_DEATHS.reported():
                batch = next(batches, None)
            if batch is None:
                break
            if batch.unreadable:
                self.unreadable.add(batch.unreadable)
            yield batch
        self.unreadable.report()

    def __len__(self) -> int:
        """Batches of a whole epoch, of this process."""
        return len(self.sampler)

    def set_epoch(self, epoch: int, start_batch: int = 0, *, class_ap: Sequence[float] | None = None) -> None:
        """Chooses what the next iteration yields. Nothing else decides it, so a resumed run calls this with its epoch and batch.

        Args:
            epoch: from 0.
            start_batch: its first batch.
            class_ap: AP of each class; images are drawn accordingly (``image_weights``). None: each image is drawn once.
        """
        self.sampler.epoch, self.sampler.start_batch = epoch, start_batch
        self.sampler.weights = None if class_ap is None else image_weights(self.dataset.table, class_ap)


def _read_split(spec: DatasetSpec, split: str, options: LoaderOptions, task: Task) -> tuple[list[str], LabelTable]:
    """The usable images of a split and their labels, checked; what is wrong with them is printed."""
    files = list_images(spec.sources(split))
    is_main = options.rank == 0
    table, remarks = split_labels(
        spec, split, files, task=task, workers=options.workers or 1, prefix=options.prefix, progress=is_main
    )  # fmt: skip
    names = spec.names if spec.label_nc == spec.nc else [""] * spec.label_nc
    table = check_classes(table, files, names, spec.yaml_path)
    if is_main:
        print("\n".join((*remarks, summarise(table, prefix=options.prefix, whole_images=task.whole_image))))
    files, table = _select_usable(files, table, options.min_items, spec, split)
    return files, table.as_one_class() if options.single_cls or spec.single_cls else table


def _select_usable(
    files: Sequence[str], table: LabelTable, min_items: int, spec: DatasetSpec, split: str
) -> tuple[list[str], LabelTable]:  # fmt: skip
    """Without the images that cannot be used; at least one with an object must be left."""
    keep = table.usable
    if not keep.any():
        raise UserError(f"{spec.yaml_path}: none of the {len(files)} images of {split!r} can be used, first: {table.problems[0]}")
    if not len(table.classes):
        raise UserError(f"{spec.yaml_path}: no labels at all for the {len(files)} images of {split!r}, {_labels_expected(spec, files)}")
    keep = keep & (table.counts >= min_items)
    if not keep.any():
        raise UserError(f"{spec.yaml_path}: no image of {split!r} has --min-items {min_items} objects")
    return [f for f, k in zip(files, keep) if k], table.select(keep)


def _labels_expected(spec: DatasetSpec, files: Sequence[str]) -> str:
    """What is there instead of labels, or where the first is expected."""
    if has_class_folders(spec, files):
        return "which lie in a folder for each class: such a set is for a network that classifies (yolov8n-cls.yaml)"
    if all(Path(label_path(file)).is_file() for file in files):
        return "whose label files are all empty"
    return f"the first is expected at {label_path(files[0])}"


def _fill_cache(dataset: ImageDataset, options: LoaderOptions) -> None:
    """Caches the images as asked; prints a line where that failed."""
    if not options.cache:
        return
    prefix, is_main = options.prefix, options.rank == 0
    if options.cache == "ram":
        processes = min(options.world_size, local_world_size())
        remark = dataset.store.keep_in_ram(processes=processes, prefix=prefix, progress=is_main)
    elif options.cache == "disk":
        remark = dataset.store.keep_on_disk(prefix=prefix, progress=is_main)
    else:
        raise UserError(f"--cache {options.cache}: ram or disk is expected")
    if is_main and remark:
        print(remark)


def _build_sampler(table: LabelTable, options: LoaderOptions, *, bytes_per_pixel: int) -> EpochSampler:
    shapes = None
    if options.rect:
        shapes = rectangular_shapes(
            table.shapes_hw, batch_size=options.batch_size, imgsz=options.imgsz, stride=options.stride, pad=options.pad
        )  # fmt: skip
    sampling = SamplerOptions(
        batch_size=options.batch_size,
        hw=(options.imgsz, options.imgsz),
        shuffle=options.augment,
        seed=options.seed,
        rank=options.rank,
        world_size=options.world_size,
        whole_batches=options.whole_batches,
        mosaic_until=0 if options.rect else options.mosaic_until,
        partners_of_all=is_small(len(table), image_bytes=options.imgsz**2 * bytes_per_pixel),
    )
    return EpochSampler(len(table), sampling, rect_shapes=shapes)


def _identity(batch: Any) -> Any:
    """In place of a collate function: ``ImageDataset.__getitems__`` returns whole batches."""
    return batch
