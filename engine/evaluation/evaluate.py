"""``evaluate(model, loader) -> metrics``: the one function that train.py, val.py and the doctor measure with."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from engine.evaluation.callbacks import EvaluatedBatch, EvaluationCallback, ImageSaver
from engine.inference.predictor import INFERENCE, PRE_PROCESS, STAGES, Network, Predictor
from engine.logging.observing import observing
from engine.logging.progress import LossMeter
from engine.micro_batches import MicroBatches, mean_parts
from models.heads.base import Head
from models.model import Model
from utils import distributed
from utils.nms import Suppression
from utils.precision import autocast
from utils.types import Batch, Predictions, to_unit_range

if TYPE_CHECKING:
    from data.loader import BatchLoader
    from engine.inference.sliced import SlicedEvaluation
    from models.heads.base import Loss
    from tasks.base import Metric, MetricResult, Task
    from utils.metrics.coco_eval import CocoAnnotations

VALIDATION = Suppression(conf=0.001, iou=0.7, max_det=300, multi_label=True)


@dataclass(frozen=True)
class EvaluationOptions:
    """How an evaluation is done.

    Attributes:
        suppression: What is kept of the predictions.
        device: Where to run; the model's own if None.
        precision: Type of the network's forward pass; float32 if None.
        annotations: Ground truth from a COCO file; the labels' objects if None.
        sliced: Adds what windows of the original images show; None evaluates whole images only.
        plots_dir: Where example images, curves and the confusion matrix are written; None writes none.
        progress: Whether to show a progress bar.
    """

    suppression: Suppression = field(default_factory=lambda: VALIDATION)
    device: torch.device | None = None
    precision: torch.dtype | None = None
    annotations: CocoAnnotations | None = None
    sliced: SlicedEvaluation | None = None
    plots_dir: Path | None = None
    progress: bool = True


@torch.no_grad()
def evaluate(
    model: Network,
    loader: BatchLoader | Sequence[Batch],
    options: EvaluationOptions | None = None,
    *,
    metric: Metric | None = None,
    loss: Loss | None = None,
    callbacks: Sequence[EvaluationCallback] = (),
) -> Any:
    """Runs a model over a loader and measures what it finds, in px of the original images.

    Each of several ranks takes its loader's share, and every one returns the metrics of the whole.

    Args:
        model: A Model, an exported file, several as one, or either with test-time augmentation; left in the mode it came in.
        loader: Yields batches.
        options: How; the defaults of validation if None.
        metric: Collects detections and ground truth; an empty one of the model's task and class names if None.
        loss: Its parts are averaged over the images as well; needs a Model.
        callbacks: Called with every batch, on the main rank unless they say otherwise.
    """
    options = options or EvaluationOptions()
    device = options.device or device_of(model)
    metric = metric or model.task.metric(model.names)
    if options.plots_dir is not None:
        callbacks = [*callbacks, ImageSaver(options.plots_dir, metric.names, model.task)]
    called = [c for c in callbacks if distributed.is_main() or getattr(c, "everywhere", False)]
    pipeline = _Pipeline(Predictor(model, options.suppression, device=device, precision=options.precision), loss, options)
    batches = with_progress(loader, shown=options.progress and distributed.is_main())
    with evaluation_mode(model), closing(batches):  # an interruption clears the bar
        for index, batch in enumerate(batches):
            evaluated = pipeline.run(index, batch)
            if batch.images_of_step:
                annotations = options.annotations
                metric.update(evaluated.found, evaluated.truth, images=annotations.ids_of(batch.paths) if annotations else batch.paths)
            for callback in called:
                callback.on_batch(evaluated)
    metrics = _merge_ranks(metric, pipeline)
    if options.plots_dir is not None and distributed.is_main():
        plot_result(model.task, metrics, options.plots_dir)
    return metrics


def plot_result(task: Task, metrics: MetricResult, folder: Path) -> None:
    """Writes the task's figures; where one fails, a line says so."""
    with observing("plotting curves and confusion matrix"):
        task.plot(metrics, folder)


class _Pipeline:
    """From a batch to its detections, ground truth and loss."""

    def __init__(self, predictor: Predictor, loss: Loss | None, options: EvaluationOptions) -> None:
        self.predictor, self.loss, self.options = predictor, loss, options
        self.meter = LossMeter(loss.names if loss else ())
        self.micro_batches = MicroBatches(predictor.device)

    def run(self, index: int, batch: Batch) -> EvaluatedBatch:
        predictor, task = self.predictor, self.predictor.task
        predictions, parts = join_forwards(self.micro_batches.results(batch, self._forward, place="validation"))
        if self.loss is not None:
            self.meter.update(parts, counts=batch.images_of_step > 0)
        found = predictor.detections(predictions, batch.letterbox, compact=True)
        if self.options.sliced is not None:
            with predictor.stopwatch.stage(INFERENCE):  # with the suppression of what its windows show
                found = self.options.sliced(batch, found)
        annotations = self.options.annotations
        truth = annotations.truth_of(batch.paths, hws=batch.letterbox.original_hw.numpy()) if annotations else task.ground_truth(batch)
        return EvaluatedBatch(index, batch, task, found, truth)

    def _forward(self, batch: Batch) -> Forward:
        predictor = self.predictor
        with predictor.stopwatch.stage(PRE_PROCESS):
            batch = batch.to(predictor.device)
            low = predictor.precision if isinstance(predictor.network, torch.nn.Module) else None
            images = to_unit_range(batch.images, low or torch.float32)  # what autocast would make of it at once
        with predictor.stopwatch.stage(INFERENCE):
            output, predictions = forward(predictor, images)
        return Forward(predictions, self.loss(output, batch) if self.loss else {})


class Forward(NamedTuple):
    """What a network makes of a batch, or of a micro-batch."""

    predictions: Predictions
    parts: dict[str, Tensor]  # of the loss, means over the images


def forward(predictor: Predictor, images: Tensor) -> tuple[Any, Predictions]:
    """Raw maps (None where the network is no single Model) and decoded predictions of images (B, C, H, W) in 0-1."""
    if not isinstance(predictor.network, torch.nn.Module):
        return None, predictor.forward(images)
    model: Any = predictor.network
    with autocast(predictor.device, predictor.precision):
        output = model.infer(images) if isinstance(model, Model) else model(images)
    if isinstance(model.head, Head):
        return output, model.head.decode_above(output, predictor.suppression.conf)
    return output, model.head.decode(output)


def join_forwards(parts: Sequence[tuple[Batch, Forward]]) -> Forward:
    """The results of micro-batches as that of the batch that they are of."""
    if len(parts) == 1:
        return parts[0][1]
    most = max(result.predictions.scores.shape[1] for _, result in parts)
    predictions = Predictions.cat([result.predictions.padded(most) for _, result in parts])
    return Forward(predictions, mean_parts([(result.parts, len(batch.images)) for batch, result in parts]))


class Share(NamedTuple):
    """What one rank adds to the metrics of all."""

    state: dict[str, Any]
    seconds: dict[str, float]
    images: int


def _merge_ranks(metric: Metric, pipeline: _Pipeline) -> Any:
    """The metrics of what all ranks have measured; alone, of what this one has."""
    state = metric.state()
    seconds, meter = pipeline.predictor.stopwatch.seconds, pipeline.meter
    shares: list[Share] = distributed.gather_objects(Share(state, seconds, len(state["images"])))
    if len(shares) > 1:
        for share in shares:
            metric.merge(share.state)  # its own images are known already
    images = sum(s.images for s in shares)
    losses = meter.means() if meter.count else {}
    speed = {stage: 1000 * sum(s.seconds[stage] for s in shares) / max(images, 1) for stage in STAGES}
    return replace(metric.compute(), losses=losses, speed_ms=speed)


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode it was in."""
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def device_of(model: Any) -> torch.device:
    """Where a network's parameters are; the CPU for what is no module."""
    return next(model.parameters()).device if isinstance(model, torch.nn.Module) else torch.device("cpu")


def with_progress(loader: BatchLoader | Sequence[Batch], *, shown: bool) -> Generator[Batch, None, None]:
    """The batches of a loader behind a progress bar."""
    from tqdm import tqdm

    yield from tqdm(loader, total=len(loader), desc="validating", disable=not shown, leave=False)
