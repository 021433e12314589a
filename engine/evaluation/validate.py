"""Validation of weights on a split: what val.py does. Prints the table and writes the run folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.dataset_spec import DatasetSpec, load_dataset_spec
from data.labels.files import list_images
from data.loader import BatchLoader, LoaderOptions, build_loader
from engine.channels import spec_for
from engine.evaluation.callbacks import EvaluationCallback, ImageSaver, TextSaver
from engine.evaluation.evaluate import EvaluationOptions, evaluate, plot_result
from engine.evaluation.ground_truth import split_truth
from engine.evaluation.outputs import write_numbers
from engine.inference.augmented import AugmentedModel
from engine.inference.class_order import in_order_of, shortened
from engine.inference.networks import LoadOptions, is_exported, load_networks
from engine.inference.predictor import Network, Predictor, fixed_size
from engine.inference.sliced import SlicedEvaluation, SlicedPredictor, check_slices
from models.checkpoints.checkpoint import load_checkpoint
from tasks.base import Metric
from utils import distributed
from utils.cli.sizes import multiple_of_stride
from utils.cli.val_arguments import STUDIES, ValConfig
from utils.config import Hyperparameters
from utils.errors import UserError
from utils.metrics.coco_file import number_images
from utils.nms import Suppression
from utils.run_folders import new_run_dir, newest_weights
from utils.sizes import round_up_to_stride
from utils.visual.figures import figure_formats

if TYPE_CHECKING:
    from tasks.base import MetricResult
    from utils.metrics.coco_eval import CocoAnnotations


def run_validation(config: ValConfig) -> None:
    """One validation, or the study that ``--task`` names."""
    if config.task in STUDIES:
        from engine.evaluation import studies

        with figure_formats(config.plots):
            {"speed": studies.speed, "study": studies.study}[config.task](config, validate, check)
    else:
        validate(config)


def validate(config: ValConfig) -> Any:
    """Validates the weights on the split that the configuration names, prints the table and writes the run folder.

    Raises:
        UserError: whatever a user can cause, in one line.
    """
    with distributed.watch_ranks(), figure_formats(config.plots):
        return validate_on_rank(config)


def check(config: ValConfig, *, sizes: Sequence[int] = ()) -> ValConfig:
    """Refuses what a validation would refuse of weights, data and size, without validating.

    Args:
        config: of one validation.
        sizes: sides of the input in px that are to be measured; a file of another fixed size is refused.

    Returns:
        The configuration with the data set that it uses.
    """
    config, model = load_weights(config, choose_device(config))
    open_spec(config, model)
    check_size(config, model, sizes=sizes)
    return config


def choose_device(config: ValConfig) -> torch.device:
    """Where to run, as the flags say."""
    device = distributed.select_device(config.device)
    if config.half and device.type != "cuda":
        raise UserError(f"--half: needs a GPU, this is {device.type}; leave it out")
    return device


def validate_on_rank(config: ValConfig) -> Any:
    """The same on each of several ranks."""
    device = choose_device(config)
    with distributed.process_group(device):
        config, model = load_weights(config, device)
        spec, loader = open_data(config, model)
        model = by_class_name(model, spec, data=config.data, weights=config.weights)
        annotations = split_truth(spec, config.task, task=model.task)
        if annotations is not None:
            annotations.check_unique(loader.dataset.image_files)
            if distributed.is_main() and (line := annotations.other_sizes(loader.dataset.image_files, loader.dataset.shapes_hw)):
                print(line)
        save_dir = run_folder(config)
        metric = loader.dataset.task.metric(spec.names, rule=config.ap_rule)
        options = evaluation_options(config, model, loader, device=device, annotations=annotations)
        metrics = evaluate(model, loader, options, metric=metric, callbacks=callbacks_of(config, spec, model, save_dir))
        if distributed.is_main():
            report(metrics, config, classes=spec.nc)
            plot_result(model.task, metrics, save_dir)
            write_numbers(metrics, save_dir, metric, context_of(config, model))
            if config.save_json and model.task.submission:
                stems = {path: Path(path).stem for path in loader.dataset.image_files}
                print(model.task.write_submission(metric, save_dir / model.task.submission, stems=stems))
            elif config.save_json:
                files = list_images(spec.sources(config.task))
                save_json(metric, annotations, config, save_dir, image_ids=dict(zip(files, number_images(files))))
            print(f"Results in {save_dir}")
    return metrics


def context_of(config: ValConfig, model: Network) -> dict[str, Any]:
    """What metrics.json says of the evaluation."""
    parameters = sum(p.numel() for p in model.parameters()) if isinstance(model, torch.nn.Module) else None
    files = {"weights": " ".join(config.all_weights), "data": config.data, "split": config.task}
    return {**files, "imgsz": config.imgsz, "batch_size": config.batch_size, "parameters": parameters}


def evaluation_options(
    config: ValConfig, model: Network, loader: BatchLoader, *, device: torch.device, annotations: CocoAnnotations | None
) -> EvaluationOptions:
    """How to evaluate, as the flags say."""
    conf = model.task.defaults.val_conf if config.conf_thres is None else config.conf_thres
    suppression = Suppression(conf=conf, iou=config.iou_thres, max_det=config.max_det, multi_label=True)
    precision = torch.float16 if config.half else None
    sliced = None
    if config.slice is not None:
        predictor = Predictor(model, suppression, device=device, precision=precision)
        side = loader.dataset.imgsz
        windows = SlicedPredictor(
            predictor, (config.slice[0], config.slice[1]), config.slice_overlap, (side, side), batch=config.batch_size
        )  # fmt: skip
        sliced = SlicedEvaluation.of(windows, loader.dataset)
    return EvaluationOptions(suppression, device=device, precision=precision, annotations=annotations, sliced=sliced)


def callbacks_of(config: ValConfig, spec: DatasetSpec, model: Network, save_dir: Path) -> list[EvaluationCallback]:
    """Example images, and label files where they are asked for."""
    callbacks: list[EvaluationCallback] = [ImageSaver(save_dir, spec.names, model.task)]
    if config.save_txt:
        files = list_images(spec.sources(config.task))
        saver = TextSaver(save_dir, spec.names, with_confidence=config.save_conf, with_truth=config.save_hybrid, image_files=files)
        callbacks.append(saver)
    return callbacks


def load_weights(config: ValConfig, device: torch.device) -> tuple[ValConfig, Network]:
    """The model, ready for inference, and the configuration with weights and data filled in where they were left out."""
    if not config.weights:
        config = replace(config, weights=str(newest_weights()))
        print(f"No --weights given: validating the newest run, {config.weights}")
    if is_exported(config.weights, plugins=config.plugins) and not config.data:
        raise UserError(f"--data: an exported file does not say what it was trained on; give the data set for {config.weights}")
    options = LoadOptions(plugins=config.plugins, download=config.download, half=config.half, trust=config.trust, nms=config.nms)
    model = load_networks(config.all_weights, device=device, options=options)
    config = replace(config, imgsz=config.imgsz or model.task.defaults.imgsz)
    check_slices(model.task, config.slice)
    if not config.data:
        config = replace(config, data=str(load_checkpoint(config.weights).config.get("data") or ""))
        if not config.data:
            raise UserError(f"--data: {config.weights} does not say what it was trained on; give the data set")
        print(f"No --data given: {config.data}, as the checkpoint says")
    return config, AugmentedModel(model) if config.augment else model


def open_spec(config: ValConfig, model: Network) -> DatasetSpec:
    """The data set of the model's classes and channels."""
    if config.save_json and model.task.coco_type is None and not model.task.submission:
        raise UserError(f"--save-json: results of the task {model.task.name!r} have no form in COCO; leave it out")
    spec = load_dataset_spec(config.data, single_cls=config.single_cls, need=(config.task,))
    if spec.nc != model.nc:
        raise UserError(f"{config.data}: {spec.nc} classes, but {config.weights} was trained for {model.nc}; give the data set of its own")
    return spec_for(spec, model, weights=config.weights)


def open_data(config: ValConfig, model: Network) -> tuple[DatasetSpec, BatchLoader]:
    """The data set and the loader of its split: batches of similar shape for models that take any, square ones for the others."""
    spec = open_spec(config, model)
    takes_any_shape = fixed_size(model) is None
    options = LoaderOptions(
        imgsz=_image_size(config, model),
        batch_size=config.batch_size,
        hyp=Hyperparameters(),
        augment=False,
        rect=takes_any_shape,
        pad=0.5 if takes_any_shape else 0.0,
        stride=model.stride,
        workers=config.workers,
        single_cls=config.single_cls,
        min_items=config.min_items,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        whole_batches=True,
    )
    with distributed.local_main_first():
        return spec, build_loader(spec, config.task, options, task=model.task)


def by_class_name(model: Network, spec: DatasetSpec, *, data: str, weights: str) -> Network:
    """The model with its classes in the data set's order, by name; as it is, with a line, where the two have other names.

    Args:
        model: what is run.
        spec: the data set.
        data: what the data set is called in the line.
        weights: what the model is called in it.
    """
    if spec.single_cls:
        return model
    ordered = in_order_of(model, spec.names)
    if not distributed.is_main() or ordered is model:
        return ordered or model
    if ordered is None:
        both = f"{shortened(spec.names)}; those of {weights} are {shortened(model.names)}"
        print(f"warning: {data}: classes {both}: they are compared by class number", file=sys.stderr)
    else:
        print(f"classes   {data} has the classes of {weights} in another order; they are matched by name")
    return ordered or model


def run_folder(config: ValConfig) -> Path:
    """A new folder, the same on all ranks."""
    made = new_run_dir(config.project, config.name, exist_ok=config.exist_ok) if distributed.is_main() else None
    return Path(str(distributed.broadcast_object(made)))


def report(metrics: MetricResult, config: ValConfig, *, classes: int) -> None:
    """Prints the table and the speed."""
    print(metrics.table(per_class=config.verbose or classes <= 50))
    print(*metrics.remarks, sep="\n", end="\n" if metrics.remarks else "")
    speed = ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in metrics.speed_ms.items())
    print(f"Speed per image at batch {config.batch_size}: {speed}")


def save_json(
    metric: Metric, annotations: CocoAnnotations | None, config: ValConfig, save_dir: Path, *, image_ids: Mapping[str, int]
) -> dict[str, float] | None:
    """Writes the detections for pycocotools, and runs it where the ground truth is at hand.

    Args:
        metric: holds the detections.
        annotations: the ground truth where it is a COCO file.
        config: names the weights.
        save_dir: run folder.
        image_ids: by path; used where there is no COCO file.
    """
    from utils.metrics.coco_eval import category_ids_of, run_pycocotools, write_coco_json

    path = save_dir / f"{Path(config.weights).stem}_predictions.json"
    ids = annotations.category_ids if annotations else category_ids_of(metric.names)
    count = write_coco_json(path, metric, category_ids=ids, image_ids=None if annotations else image_ids)
    print(f"{count} detections in {path}")
    if annotations is None:
        print("pycocotools: not run, the ground truth is no COCO file (annotations/instances_*.json beside the images)")
        return None
    images = metric.state()["images"]
    wanted = None if annotations.single_class else ids
    stats: dict[str, float] = {}
    for kind, options in metric.coco_kinds.items():
        stats = run_pycocotools(
            annotations.path, path, image_ids=images, category_ids=wanted, use_categories=not annotations.single_class, kind=kind, **options
        )
        print(f"pycocotools{'' if kind == 'bbox' else f' ({kind})'}: " + ", ".join(f"{name} {value:.3f}" for name, value in stats.items()))
    return stats


def check_size(config: ValConfig, model: Network, *, sizes: Sequence[int] = ()) -> None:
    """Refuses a file of fixed size that is no square, or none of ``sizes``, rounded up to the stride."""
    height, width = fixed_size(model) or (0, 0)
    if height != width:
        raise UserError(f"{config.weights}: made for {height}x{width} px; validation needs a square size: export it with --dynamic")
    other = next((side for side in sizes if height and round_up_to_stride(side, model.stride) != height), None)
    if other is not None:
        raise UserError(f"{config.weights}: made for {height} px, not for {other}; export it with --dynamic, or leave it out")


def _image_size(config: ValConfig, model: Network) -> int:
    """The side of the input in px, as the model can take it."""
    check_size(config, model)
    if only := fixed_size(model):
        if only[0] != config.imgsz:
            print(f"{config.weights}: made for {only[0]} px, which is taken in place of --imgsz {config.imgsz}")
        return only[0]
    return multiple_of_stride(config.imgsz or model.task.defaults.imgsz, model.stride)
