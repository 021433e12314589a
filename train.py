"""Trains a detector: arguments -> TrainConfig -> train() -> fit() -> train_one_epoch().

Example:
    python train.py --cfg yolov9-t-FocalModulation.yaml --data mydata.yaml --imgsz 640 --epochs 100
    python train.py                      # a few minutes on the embedded data set
    python train.py --resume             # resumes the newest run
    torchrun --nproc_per_node 4 train.py --cfg yolov9-c.yaml --data coco.yaml --batch-size 64
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.evaluation.evaluate import EvaluationOptions, evaluate
from engine.evaluation.outputs import write_numbers
from engine.logging.callbacks import Callback
from engine.logging.loggers import csv_row
from engine.logging.progress import EpochBar
from engine.precise_batch_norm import estimate_running_statistics
from engine.training.evolve import evolve
from engine.training.optim import learning_rates
from engine.training.run import Run, context_of
from engine.training.saving import explain_interruption, finish_weights, save_deployed, save_epoch, save_within_epoch
from engine.training.setup.build import build_run
from engine.training.setup.config import resolve_config
from models.checkpoints.checkpoint import load_checkpoint
from utils import distributed
from utils.cli.script import run_script
from utils.cli.train_arguments import parse_arguments
from utils.config import TrainConfig
from utils.precision import choose_kernels
from utils.random_state import seed_everything
from utils.run_folders import RunLock
from utils.text_table import counted
from utils.visual.figures import figure_formats

if TYPE_CHECKING:
    from tasks.base import MetricResult

LOG_EVERY = 10  # iterations between two readings of the losses; each waits for the device


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # batch systems stop a job with SIGTERM; handled like Ctrl-C

    def body() -> None:
        config = parse_arguments(argv)
        evolve(config, train) if config.evolve else train(config)

    return run_script("train.py", body, reason="nothing was trained yet")


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a training."""

    save_dir: Path
    best: MetricResult  # of best.pt
    last: MetricResult | None  # of the last epoch; None where a resume found every epoch done
    best_epoch: int  # from 1, as on the console and in results.csv
    epochs: int  # that were trained in all

    @property
    def best_weights(self) -> Path:
        return self.save_dir / "weights" / "best.pt"

    @property
    def deployed_weights(self) -> Path:
        """Of best.pt: folded, without auxiliary branches."""
        return self.save_dir / "weights" / "best-deploy.pt"

    @property
    def last_weights(self) -> Path:
        return self.save_dir / "weights" / "last.pt"


def train(config: TrainConfig, *, callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Trains as the config says, or resumes a run.

    Args:
        callbacks: called on the main rank; they observe the run and cannot change it.

    Raises:
        UserError: whatever a user can cause, in one line.
    """
    with distributed.watch_ranks(), RunLock() as lock:
        config, checkpoint = resolve_config(config, lock)
        device = distributed.select_device(config.device)
        with distributed.process_group(device):
            seed_everything(config.seed + distributed.rank(), deterministic=config.deterministic)
            choose_kernels(deterministic=config.deterministic, sizes_vary=config.multi_scale or config.rect)
            run = build_run(config, checkpoint, device, callbacks, lock=lock)
            with explain_interruption(run), figure_formats(run.config.plots):
                return fit(run)


def fit(run: Run) -> TrainResult:
    """Trains the epochs that are left, then validates and finishes the best weights."""
    config, progress, stop = run.config, run.progress, run.progress.early_stop
    started, metrics = time.perf_counter(), None
    run.callbacks.on_train_start(run.info)
    with run.signals:
        for epoch in progress.epochs_left(config.epochs):
            losses = train_one_epoch(run, epoch)
            is_last = epoch + 1 == config.epochs
            if config.precise_bn:
                estimate_running_statistics(run, epoch)
            if not config.noval or is_last:
                metrics = validate(run)
            stop.update(epoch, metrics.fitness if metrics else 0.0)
            is_last = distributed.broadcast_object(is_last or stop.is_due(epoch))
            run.end_epoch(csv_row(epoch, losses, metrics, learning_rates(run.state.optimizer)), metrics)
            if distributed.is_main() and (not config.nosave or is_last):
                save_epoch(run, metrics)
            run.callbacks.on_epoch_end(run.info, progress.rows[-1])
            if is_last:
                break
    if progress.epoch < config.epochs:
        print(f"No better epoch than {stop.best_epoch + 1} in {config.patience}, so training stops early (--patience)")
    trained = progress.epoch - progress.start_epoch
    print(f"{counted(trained, 'epoch')} in {time.perf_counter() - started:.0f} s")
    best = validate_best(run)
    run.callbacks.on_train_end(run.info)
    finish_weights(run)  # after this the run cannot be resumed
    return TrainResult(run.save_dir, best, metrics, stop.best_epoch + 1, progress.epoch)


def train_one_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Trains on every batch of an epoch; returns the means of the loss parts.

    Raises:
        UserError: too many losses in a row are non-finite.
    """
    loader, step, meter, progress = run.loaders.train, run.step, run.meter, run.progress
    loader.set_epoch(epoch, start_batch=progress.batch, class_ap=progress.class_ap)
    run.state.set_training_mode()
    objects = "images" if run.state.model.task.whole_image else "boxes"
    bar = EpochBar(
        loader, names=meter.names, epoch=epoch, epochs=run.config.epochs, done=progress.batch, shown=distributed.is_main(), objects=objects
    )
    for iteration, batch in enumerate(bar, progress.batch):
        is_last = iteration + 1 == len(loader)
        step.begin(epoch, iteration, is_last=is_last)
        run.first_batches.see(iteration, batch)
        parts, side_px = step.backward(batch)  # forward, loss, backward; gradients are summed
        if step.is_due:
            step.update_weights()  # optimizer and moving average
        meter.update(parts, counts=batch.images_of_step > 0)
        if iteration % LOG_EVERY == 0 or is_last:
            step.guard.check()
            bar.show(meter.means(), device=run.device, boxes=len(batch.targets), side=side_px)
        run.callbacks.on_batch(run.info, epoch, iteration, batch)
        if step.is_due:
            progress.batch = iteration + 1
            save_within_epoch(run)
    step.guard.report(epoch)
    return meter.means()


def validate(run: Run) -> MetricResult:
    """Metrics of the moving average on the validation images."""
    state, loaders = run.state, run.loaders
    distributed.broadcast_tensors(state.ema.model.buffers())  # running statistics differ between ranks
    with run.isolated_validation():
        options = EvaluationOptions(precision=run.step.precision, annotations=loaders.annotations)
        return evaluate(state.ema.model, loaders.val, options, loss=state.loss)


def validate_best(run: Run) -> MetricResult:
    """Validates best.pt with all plots, saves its deployed form, and prints where the results are."""
    model, loaders = run.state.ema.model, run.loaders
    best, last = (run.save_dir / "weights" / name for name in ("best.pt", "last.pt"))
    if distributed.is_main():
        model.load_state_dict(load_checkpoint(best).weights)
    distributed.broadcast_tensors(model.state_dict().values())  # other machines may not see the file
    options = EvaluationOptions(annotations=loaders.annotations, plots_dir=None if run.config.noplots else run.save_dir)
    deployed = model.deploy()
    metric = deployed.task.metric(deployed.names)
    metrics = evaluate(deployed, loaders.val, options, metric=metric)
    if distributed.is_main():
        print(metrics.table())
        write_numbers(metrics, run.save_dir, metric, context_of(run, best, deployed))
        save_deployed(run, best)
        epoch = run.progress.early_stop.best_epoch + 1
        print(f"Best epoch {epoch}: {best}; last {last}; images, curves and results.csv in {run.save_dir}")
    return metrics


if __name__ == "__main__":
    sys.exit(main())
