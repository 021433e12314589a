"""The data of a run: the data set, its loaders, and what is said about its labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.evaluation.ground_truth import label_truth
from engine.training.resume import check_classes
from engine.training.run import Loaders
from models.checkpoints.checkpoint import Checkpoint
from tasks import Task
from utils import distributed
from utils.cli.sizes import multiple_of_stride
from utils.config import Hyperparameters, TrainConfig
from utils.errors import UserError

if TYPE_CHECKING:
    from data.dataset_spec import DatasetSpec


def load_data(config: TrainConfig, checkpoint: Checkpoint | None) -> DatasetSpec:
    """The data set; that of a resumed run has the classes that its checkpoint names.

    Raises:
        UserError: its file cannot be used, or has other classes.
    """
    from data.dataset_spec import load_dataset_spec

    try:
        spec = load_dataset_spec(config.data, single_cls=config.single_cls)
    except UserError as error:
        if not config.resume or "data" in config.given:
            raise
        raise UserError(f"{error}; if the data set was moved, add --data FILE to --resume {config.resume}") from error
    if config.resume and checkpoint is not None:
        check_classes(spec.names, checkpoint, source=str(spec.yaml_path))
    return spec


def build_loaders(
    config: TrainConfig, hyp: Hyperparameters, spec: DatasetSpec, *, task: Task, stride: int, finish_on_device: bool = False
) -> Loaders:
    """Training and validation batches. One rank of each machine reads the labels first, so that the others find its cache.

    ``finish_on_device`` leaves colour and flips of training images to the device.

    Raises:
        UserError: --batch-size is no multiple of the number of ranks, or the data set cannot be read.
    """
    from data.labels.content_hash import content_hash
    from data.loader import LoaderOptions, build_loader

    world = distributed.world_size()
    if config.batch_size % world:
        raise UserError(f"--batch-size {config.batch_size}: is shared by {world} processes, give a multiple of {world}")
    train_px, val_px = (multiple_of_stride(px, stride) for px in (config.imgsz, config.val_imgsz or config.imgsz))
    shared: dict[str, Any] = {
        "hyp": hyp, "stride": stride, "workers": config.workers, "seed": config.seed, "cache": config.cache or None,
        "rank": distributed.rank(), "world_size": world,
    }  # fmt: skip
    train_options = LoaderOptions(
        imgsz=train_px, batch_size=config.batch_size, augment=True, rect=config.rect, min_items=config.min_items,
        mosaic_until=config.epochs - hyp.close_mosaic, finish_on_device=finish_on_device, prefix="train: ", **shared,
    )  # fmt: skip
    val_options = LoaderOptions(
        imgsz=val_px, batch_size=config.batch_size * 2, augment=False, rect=True, pad=0.5, prefix="val: ", **shared
    )  # fmt: skip
    with distributed.local_main_first():
        train, val = build_loader(spec, "train", train_options, task=task), build_loader(spec, "val", val_options, task=task)
    truth = label_truth(spec, "val", val.dataset.image_files, task=task) if task.coco_type else None
    hashes = {name: content_hash(loader.dataset.image_files, loader.dataset.table) for name, loader in (("train", train), ("val", val))}
    return Loaders(train, val, truth, origin={"file": str(spec.yaml_path), **hashes})


def report_data(loaders: Loaders, spec: DatasetSpec, folder: Path, *, whole_images: bool = False) -> None:
    """Prints a summary of the labels, which have been read by now, and writes every problem into a file of the run folder."""
    from data.labels.problems import write_problems
    from data.tools.summary import summarize_labels

    if not distributed.is_main():
        return
    train, val = loaders.train.dataset, loaders.val.dataset
    splits = (train.image_files, train.table), (val.image_files, val.table)
    print("\n".join(summarize_labels(*splits, spec.names, whole_images=whole_images)))
    problems = list(dict.fromkeys((*train.problems, *val.problems)))
    if problems:
        try:
            write_problems(folder / "data_problems.txt", problems)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
        print(f"data      {len(problems)} problems, all in {folder / 'data_problems.txt'}; python -m data.check looks closer")
