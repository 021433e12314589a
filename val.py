"""Validates a detector: arguments -> ValConfig -> validate() -> evaluate(model, loader) -> Metrics. train.py calls evaluate() too.

Example:
    python val.py --weights runs/train/exp/weights/best.pt --data mydata.yaml --imgsz 640 --save-json
    python val.py                        # the newest run's best.pt on the data set that it was trained on
    python val.py --weights best.onnx --data mydata.yaml
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from engine.channels import spec_for
from engine.evaluation.ground_truth import split_truth
from engine.evaluation.observers import EvaluatedBatch, EvaluationObserver, ImageSaver, TextSaver, save_plots
from engine.logging.progress import LossMeter
from engine.micro_batches import MicroBatches, mean_parts
from utils import distributed
from utils.boxes import cxcywh_to_xyxy, denormalised, to_batch, to_original, xyxy_to_ltwh
from utils.cli.flags import multiple_of_stride
from utils.cli.val_arguments import STUDIES, ValConfig, parse_arguments
from utils.errors import UserError
from utils.metrics.metrics import GroundTruth, MetricAccumulator, Metrics
from utils.nms import non_max_suppression
from utils.precision import autocast
from utils.types import Batch, Detections, Letterbox, Predictions, to_unit_range

if TYPE_CHECKING:
    from data.dataset_spec import DatasetSpec
    from data.loader import BatchLoader
    from engine.inference.augmented import AugmentedModel
    from engine.inference.ensemble import Ensemble
    from models.export.runtimes import ExportedModel
    from models.heads.base import Loss
    from models.model import Model
    from utils.metrics.coco_eval import CocoAnnotations

    AnyModel = Model | ExportedModel | Ensemble | AugmentedModel

SlicedEvaluation = Callable[[Batch, Sequence[Detections]], list[Detections]]
STAGES = ("pre-process", "inference", "NMS")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        run(parse_arguments(argv))
    except UserError as error:
        print(f"val.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("val.py: interrupted", file=sys.stderr)
        return 130
    return 0


def run(config: ValConfig) -> None:
    """One validation, or the study that ``--task`` names."""
    if config.task in STUDIES:
        from engine.evaluation import studies

        {"speed": studies.speed, "study": studies.study}[config.task](config, validate)
    else:
        validate(config)


def validate(config: ValConfig) -> Metrics:
    """Validates the weights on the split that the configuration names, prints the table and writes the run folder.

    Raises:
        UserError: whatever a user can cause, in one line.
    """
    with distributed.watch_ranks():
        return validate_together(config)


def validate_together(config: ValConfig) -> Metrics:
    """The same on each of several processes."""
    device = distributed.select_device(config.device)
    if config.half and device.type != "cuda":
        raise UserError(f"--half: needs a GPU, this is {device.type}; leave it out")
    with distributed.process_group(device):
        config, model = load_weights(config, device)
        spec, loader = open_data(config, model)
        annotations = split_truth(spec, config.task)
        save_dir = run_folder(config)
        observers: list[EvaluationObserver] = [ImageSaver(save_dir, spec.names)]
        if config.save_txt:
            observers.append(TextSaver(save_dir, spec.names, with_confidence=config.save_conf, with_truth=config.save_hybrid))
        accumulator = MetricAccumulator(spec.names, rule=config.ap_rule)
        metrics = evaluate(
            model,
            loader,
            accumulator=accumulator,
            device=device,
            annotations=annotations,
            conf=config.conf_thres,
            iou=config.iou_thres,
            max_det=config.max_det,
            precision=torch.float16 if config.half else None,
            closer=sliced_predictor(config, model, loader, device) if config.slice else None,
            observers=observers,
        )
        if distributed.is_main():
            report(metrics, config, save_dir)
            if config.save_json:
                save_json(accumulator, metrics, annotations, config, save_dir)
            print(f"Results in {save_dir}")
    return metrics


@torch.no_grad()
def evaluate(
    model: AnyModel,
    loader: BatchLoader,
    *,
    accumulator: MetricAccumulator | None = None,
    device: torch.device | None = None,
    loss: Loss | None = None,
    annotations: CocoAnnotations | None = None,
    conf: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    precision: torch.dtype | None = None,
    closer: SlicedEvaluation | None = None,
    save_dir: Path | None = None,
    plots: bool = False,
    observers: Sequence[EvaluationObserver] = (),
    progress: bool = True,
) -> Metrics:
    """Runs a model over a loader and measures what it finds, in px of the original images.

    With several processes each takes its loader's share, and every one returns the metrics of the whole.

    Args:
        model: A Model, an exported file, several as one, or either with test-time augmentation; left in the mode it came in.
        loader: Yields batches.
        accumulator: Collects detections and objects; a new one with the model's class names and COCO's rule if not given.
        device: Where to run; the model's own if not given.
        loss: Its parts are averaged over the images as well; needs a Model.
        annotations: Ground truth from a COCO file; the labels' boxes if not given.
        conf: Least score of a detection.
        iou: Overlap above which suppression drops the weaker of two boxes.
        max_det: Most detections of an image.
        precision: Type of the network's forward pass; float32 if not given.
        closer: Looks at the original images too; from a batch and what was found on it, both in px of the originals, makes what counts.
        save_dir: Where plots go.
        plots: Whether to save images, curves and confusion matrix in ``save_dir``.
        observers: Told of every batch, on the main process unless they say otherwise.
        progress: Whether to show a progress bar.
    """
    device = device or _device_of(model)
    accumulator = accumulator or MetricAccumulator(model.names)
    if plots and save_dir is not None:
        observers = [*observers, ImageSaver(save_dir, accumulator.names)]
    stopwatch, meter = Stopwatch(device), LossMeter(loss.names if loss else ())
    micro_batches = MicroBatches(device)

    def look(batch: Batch) -> Look:
        with stopwatch.stage("pre-process"):
            batch = batch.to(device)
            images = to_unit_range(batch.images)
        with stopwatch.stage("inference"):
            output, predictions = forward(model, images, device=device, precision=precision)
        return Look(predictions, loss(output, batch) if loss else {})

    told = [o for o in observers if distributed.is_main() or getattr(o, "everywhere", False)]
    batches = _with_progress(loader, shown=progress and distributed.is_main())
    with _evaluation_mode(model), closing(batches):  # an interruption clears the bar
        for index, batch in enumerate(batches):
            predictions, parts = joined(micro_batches.results(batch, look, place="validation"))
            if loss is not None:
                meter.update(parts, counts=batch.images_of_step > 0)
            with stopwatch.stage("NMS"):
                found = non_max_suppression(predictions, conf=conf, iou=iou, max_det=max_det, multi_label=True)
            found = _on_host(found)
            detections = in_original_px(found, batch.letterbox)
            if closer is not None:
                with stopwatch.stage("inference"):  # with the suppression of what its windows show
                    detections = closer(batch, detections)
                found = moved(detections, partial(to_batch, letterbox=batch.letterbox))
            truth = annotations.truth_of(batch.paths) if annotations else truth_of_labels(batch)
            if batch.images_of_step:
                accumulator.update(detections, truth, images=annotations.ids_of(batch.paths) if annotations else batch.paths)
            for observer in told:
                observer.on_batch(EvaluatedBatch(index, batch, found, detections, truth))
    metrics = _metrics_of_all(accumulator, stopwatch, meter)
    if plots and save_dir is not None and distributed.is_main():
        save_plots(metrics, save_dir)
    return metrics


def forward(
    model: AnyModel, images: Tensor, *, device: torch.device, precision: torch.dtype | None
) -> tuple[Any, Predictions]:
    """Raw maps (None where the model is no single network) and decoded predictions of images (B, C, H, W) in 0-1."""
    with autocast(device, precision):
        if not isinstance(model, torch.nn.Module):
            return None, model.predict(images)
        output = model(images)
    return output, model.head.decode(output)


class Look(NamedTuple):
    """What a network makes of a batch, or of a portion of one."""

    predictions: Predictions
    parts: dict[str, Tensor]  # of the loss, means over the images


def joined(looks: Sequence[tuple[Batch, Look]]) -> Look:
    """MicroBatches as the batch that they are of."""
    if len(looks) == 1:
        return looks[0][1]
    predictions = Predictions(*(torch.cat(field) for field in zip(*(look.predictions for _, look in looks))))
    return Look(predictions, mean_parts([(look.parts, len(batch.images)) for batch, look in looks]))


def truth_of_labels(batch: Batch) -> GroundTruth:
    """The objects of a batch from its label files, in px of the original images."""
    image, hw = batch.targets[:, 0].long().cpu(), batch.images.shape[-2:]
    boxes = cxcywh_to_xyxy(denormalised(batch.targets[:, 2:].cpu(), (float(hw[0]), float(hw[1]))))
    boxes = to_original(boxes, batch.letterbox, image=image)
    return GroundTruth.of_boxes(image, batch.targets[:, 1].long().cpu(), xyxy_to_ltwh(boxes.double()))


def in_original_px(found: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
    """Detections of a batch in px of the original images."""
    return moved(found, partial(to_original, letterbox=letterbox))


def moved(found: Sequence[Detections], move: Callable[..., Tensor]) -> list[Detections]:
    """Detections of a batch in other coordinates; ``move`` takes all boxes at once, and which image each is on."""
    counts = [len(d.scores) for d in found]
    image = torch.arange(len(found)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    boxes = move(torch.cat([d.boxes for d in found]), image=image)
    return [d._replace(boxes=b) for d, b in zip(found, boxes.split(counts))]


class Stopwatch:
    """Seconds by stage; waits for the device at both ends of a stage, so that each pays for its own work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Share(NamedTuple):
    """What one process adds to the metrics of all."""

    state: dict[str, Any]
    seconds: dict[str, float]
    images: int


def load_weights(config: ValConfig, device: torch.device) -> tuple[ValConfig, AnyModel]:
    """The model, ready for inference, and the configuration with weights and data filled in where they were left out."""
    from engine.inference.augmented import AugmentedModel
    from engine.inference.networks import is_exported, load_networks
    from models.checkpoints.checkpoint import load_checkpoint
    from utils.run_folders import newest_weights

    if not config.weights:
        config = replace(config, weights=str(newest_weights()))
        print(f"No --weights given: validating the newest run, {config.weights}")
    if is_exported(config.weights) and not config.data:
        raise UserError(f"--data: an exported file does not say what it was trained on; give the data set for {config.weights}")
    model = load_networks(config.all_weights, device=device, plugins=config.plugins, download=config.download, half=config.half)
    if not config.data:
        config = replace(config, data=str(load_checkpoint(config.weights).config.get("data") or ""))
        if not config.data:
            raise UserError(f"--data: {config.weights} does not say what it was trained on; give the data set")
        print(f"No --data given: {config.data}, as the checkpoint says")
    return config, AugmentedModel(model) if config.augment else model


def open_data(config: ValConfig, model: AnyModel) -> tuple[DatasetSpec, BatchLoader]:
    """The data set and the loader of its split: batches of similar shape for models that take any, square ones for the others."""
    from data.dataset_spec import load_dataset_spec
    from data.loader import LoaderOptions, build_loader
    from utils.config import Hyperparameters

    spec = load_dataset_spec(config.data, single_cls=config.single_cls, need=(config.task,))
    if spec.nc != model.nc:
        raise UserError(f"{config.data}: {spec.nc} classes, but {config.weights} was trained for {model.nc}; give the data set of its own")
    spec = spec_for(spec, model, weights=config.weights)
    takes_any_shape = getattr(model, "dynamic", True)
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
        loader = build_loader(spec, config.task, options)
    return spec, loader


def sliced_predictor(config: ValConfig, model: AnyModel, loader: BatchLoader, device: torch.device) -> SlicedEvaluation:
    """Looks at the originals of a batch through windows, which become input of the size that whole images have."""
    from engine.inference.sliced import SlicedPredictor, sliced_evaluation

    assert config.slice is not None
    precision = torch.float16 if config.half else None
    side = loader.dataset.imgsz
    suppress = partial(non_max_suppression, conf=config.conf_thres, iou=config.iou_thres, max_det=config.max_det, multi_label=True)
    look = SlicedPredictor(
        predict=lambda images: forward(model, images, device=device, precision=precision)[1],
        suppress=suppress,
        size_hw=(config.slice[0], config.slice[1]),
        overlap=config.slice_overlap,
        input_hw=(side, side),
        stride=model.stride,
        fixed=not getattr(model, "dynamic", True),
        device=device,
        iou=config.iou_thres,
        max_det=config.max_det,
        batch=config.batch_size,
    )
    return sliced_evaluation(look, loader.dataset)


def run_folder(config: ValConfig) -> Path:
    """A new folder, the same on all processes."""
    from utils.run_folders import new_run_dir

    made = new_run_dir(config.project, config.name, exist_ok=config.exist_ok) if distributed.is_main() else None
    return Path(str(distributed.broadcast_object(made)))


def report(metrics: Metrics, config: ValConfig, save_dir: Path) -> None:
    """The table, the speed and the curves."""
    print(metrics.table(per_class=config.verbose or len(metrics.names) <= 50))
    sizes = ", ".join(f"{name} {value:.3f}" for name, value in zip(("small", "medium", "large"), metrics.map_by_size) if value == value)
    if sizes:
        print(f"mAP50-95 by size (rule: {metrics.rule}): {sizes}")
    print(f"P and R at confidence {metrics.confidence:.3f}, where F1 is highest (IoU 0.5)")
    speed = ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in metrics.speed_ms.items())
    print(f"Speed per image at batch {config.batch_size}: {speed}")
    save_plots(metrics, save_dir)


def save_json(
    accumulator: MetricAccumulator, metrics: Metrics, annotations: CocoAnnotations | None, config: ValConfig, save_dir: Path
) -> dict[str, float] | None:
    """Writes the detections for pycocotools, and runs it where the ground truth is at hand."""
    from utils.metrics.coco_eval import category_ids_of, run_pycocotools, write_coco_json

    path = save_dir / f"{Path(config.weights).stem}_predictions.json"
    ids = annotations.category_ids if annotations else category_ids_of(metrics.names)
    count = write_coco_json(path, accumulator, category_ids=ids)
    print(f"{count} detections in {path}")
    if annotations is None:
        print("pycocotools: not run, the data set has no annotations/instances_*.json beside its images")
        return None
    images = accumulator.state()["images"]
    wanted = None if annotations.single_class else ids
    stats = run_pycocotools(annotations.path, path, image_ids=images, category_ids=wanted, use_categories=not annotations.single_class)
    print("pycocotools: " + ", ".join(f"{name} {value:.3f}" for name, value in stats.items()))
    return stats


def _image_size(config: ValConfig, model: AnyModel) -> int:
    """The side of the input in px, as the model can take it."""
    if not getattr(model, "dynamic", True):
        height, width = model.imgsz  # type: ignore[misc]
        if height != width:
            raise UserError(f"{config.weights}: made for {height}x{width} px; validation needs a square size: export it with --dynamic")
        if height != config.imgsz:
            print(f"{config.weights}: made for {height} px, which is taken in place of --imgsz {config.imgsz}")
        return int(height)
    return multiple_of_stride(config.imgsz, model.stride)


def _metrics_of_all(accumulator: MetricAccumulator, stopwatch: Stopwatch, meter: LossMeter) -> Metrics:
    """The metrics of what all processes have seen; alone, of what this one has."""
    state = accumulator.state()
    shares: list[Share] = distributed.gather_objects(Share(state, stopwatch.seconds, len(state["images"])))
    if len(shares) > 1:
        for share in shares:
            accumulator.merge(share.state)  # its own images are known already
    images = sum(s.images for s in shares)
    losses = meter.means() if meter.count else {}
    speed = {stage: 1000 * sum(s.seconds[stage] for s in shares) / max(images, 1) for stage in STAGES}
    return replace(accumulator.compute(), losses=losses, speed_ms=speed)


def _on_host(found: Sequence[Detections]) -> list[Detections]:
    """Detections of a batch on the CPU in float32, in one transfer."""
    columns = [torch.cat((d.boxes.float(), d.scores.float()[:, None], d.classes.float()[:, None]), dim=1) for d in found]  # (n, 6)
    rows = torch.cat(columns).cpu().split([len(c) for c in columns])
    return [Detections(r[:, :4], r[:, 4], r[:, 5].long()) for r in rows]


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def _device_of(model: Any) -> torch.device:
    return next(model.parameters()).device if isinstance(model, torch.nn.Module) else torch.device("cpu")


def _with_progress(loader: BatchLoader, *, shown: bool) -> Generator[Batch, None, None]:
    from tqdm import tqdm

    yield from tqdm(loader, total=len(loader), desc="validating", disable=not shown, leave=False)


if __name__ == "__main__":
    sys.exit(main())
