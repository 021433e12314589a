"""Trains a detector: arguments -> TrainConfig -> train() -> train_one_epoch().

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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engine.evaluation.evaluate import EvaluationOptions, evaluate
from engine.logging.callbacks import Callback
from engine.logging.loggers import csv_row
from engine.logging.progress import EpochBar
from engine.micro_batches import Pass
from engine.training.deployed import save_deployed
from engine.training.evolve import evolve
from engine.training.multi_scale import rescaled
from engine.training.optim import apply_settings, learning_rates, optimizer_step
from engine.training.run import Run
from engine.training.saving import explain_interruption, finish_weights, save_epoch, save_midway
from engine.training.setup import build_run, resolve_config
from models.checkpoints.checkpoint import load_checkpoint
from utils import distributed
from utils.cli.train_arguments import parse_arguments
from utils.config import TrainConfig
from utils.errors import UserError
from utils.precision import autocast
from utils.random_state import seed_everything
from utils.types import to_unit_range

if TYPE_CHECKING:
    from utils.metrics.metrics import Metrics
    from utils.types import Batch

LOG_EVERY = 10  # iterations between looks at the losses; each look waits for the device


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop is a Ctrl-C
    try:
        config = parse_arguments(argv)
        evolve(config, train) if config.evolve else train(config)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"train.py: interrupted; {str(interrupt) or 'nothing was trained yet'}", file=sys.stderr)
        return 130
    return 0


@dataclass(frozen=True)
class TrainResult:
    """What a training leaves."""

    save_dir: Path
    best: Metrics  # of best.pt
    last: Metrics | None  # of the last epoch; None where a resume found every epoch done
    best_epoch: int  # from 0
    epochs: int  # that ran in all

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


def train(config: TrainConfig, *, observers: Sequence[Callback] = ()) -> TrainResult:
    """Trains as the config says, or resumes a run.

    Args:
        observers: told what happens, on the main process; they can change nothing.

    Raises:
        UserError: whatever a user can cause, in one line.
    """
    with distributed.watch_ranks():
        return train_together(config, observers)


def train_together(config: TrainConfig, observers: Sequence[Callback]) -> TrainResult:
    """What each of the processes does."""
    config, checkpoint = resolve_config(config)
    device = distributed.select_device(config.device)
    with distributed.process_group(device):
        seed_everything(config.seed + distributed.rank(), deterministic=config.deterministic)
        run = build_run(config, checkpoint, device, observers)
        with explain_interruption(run):
            return fit(run)


def fit(run: Run) -> TrainResult:
    """The epochs, and what comes after the last one."""
    config, stop = run.config, run.early_stop
    started, metrics = time.perf_counter(), None
    run.callbacks.on_train_start(run.info)
    with run.signals:
        for epoch in run.epochs_left():
            losses = train_one_epoch(run, epoch)
            is_last = epoch + 1 == config.epochs
            if not config.noval or is_last:
                metrics = validate(run)
            stop.update(epoch, metrics.fitness if metrics else 0.0)
            is_last = distributed.broadcast_object(is_last or stop.is_due(epoch))
            run.end_epoch(csv_row(epoch, losses, metrics, learning_rates(run.optimizer)), metrics)
            if distributed.is_main() and (not config.nosave or is_last):
                save_epoch(run, metrics)
            run.callbacks.on_epoch_end(run.info, run.rows[-1])
            if is_last:
                break
    if run.epoch < config.epochs:
        print(f"No better epoch than {stop.best_epoch + 1} in {config.patience}, so training stops early (--patience)")
    print(f"{run.epoch - run.start_epoch} epochs in {time.perf_counter() - started:.0f} s")
    best = finish(run)
    run.callbacks.on_train_end(run.info)
    finish_weights(run)  # from here on there is nothing to resume
    return TrainResult(run.save_dir, best, metrics, stop.best_epoch, run.epoch)


def train_one_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Forward, loss, backward, step. Returns the means of the loss parts.

    Raises:
        UserError: too many losses in a row are not finite.
    """
    config, loader, meter, guard = run.config, run.train_loader, run.meter, run.guard
    loader.set_epoch(epoch, start_batch=run.batch, class_ap=run.class_ap)
    set_training_mode(run)
    shown = distributed.is_main()
    bar = EpochBar(loader, total=len(loader), done=run.batch, names=meter.names, epoch=epoch, epochs=config.epochs, shown=shown)
    waiting = 0  # iterations whose gradients are not stepped yet
    for i, batch in enumerate(bar, run.batch):
        settings = run.schedule.at(epoch, i)
        apply_settings(run.optimizer, settings)
        waiting += 1
        is_last = i + 1 == len(loader)
        is_step = waiting >= settings.accumulate or is_last  # the last step takes the rest, so that an epoch ends with none waiting
        with distributed.gradient_sync(run.network, now=is_step):
            place = f"epoch {epoch + 1}, iteration {i + 1}"
            parts, side_px = run.micro_batches.run(batch, partial(forward_backward, run, epoch, i), place=place)

        if is_step:
            non_finite = guard.non_finite()  # its gradient is not finite, and no such step is taken
            taken = optimizer_step(run.optimizer, run.scaler, clip_norm=run.hyp.clip_norm, non_finite=non_finite)
            guard.after_step(taken, non_finite)
            run.ema.update(taken)
            waiting = 0

        meter.update(parts, counts=batch.images_of_step > 0)
        if i % LOG_EVERY == 0 or is_last:
            guard.check()
            bar.show(meter.means(), device=run.device, boxes=len(batch.targets), side=side_px)
        run.callbacks.on_batch(run.info, epoch, i, batch)
        if not waiting:
            run.batch = i + 1
            save_midway(run)
    guard.report(epoch)
    return meter.means()


def forward_backward(run: Run, epoch: int, iteration: int, batch: Batch) -> Pass:
    """Adds the gradients of a batch, or of a portion of one, to those that wait."""
    config = run.config
    batch = batch.to(run.device)
    images = to_unit_range(batch.images)  # (B, C, H, W) in 0-1
    if config.multi_scale:
        images = rescaled(images, base_px=config.imgsz, stride=run.model.stride, key=(config.seed, epoch, iteration))
    with autocast(run.device, run.precision):
        output = run.network(images)
    parts = run.loss(output, batch)
    total = run.guard.checked(parts, epoch=epoch, iteration=iteration, paths=batch.paths) * batch.images_of_step
    run.scaler.scale(total).backward()
    return Pass(parts, images.shape[-1])


def validate(run: Run) -> Metrics:
    """The moving average on the validation images."""
    distributed.broadcast_tensors(run.ema.model.buffers())  # each process has running statistics of its own
    with run.unchanged():
        options = EvaluationOptions(precision=run.precision, annotations=run.truth)
        return evaluate(run.ema.model, run.val_loader, options, loss=run.loss)


def set_training_mode(run: Run) -> None:
    """FrozenLayers layers keep their running statistics too."""
    run.network.train()
    for index in run.frozen.rows:
        run.model.model[index].eval()


def finish(run: Run) -> Metrics:
    """Validates best.pt with all images, leaves its deployed form beside it, and says where everything lies."""
    best, last = (run.save_dir / "weights" / name for name in ("best.pt", "last.pt"))
    if distributed.is_main():
        run.ema.model.load_state_dict(load_checkpoint(best).weights)
    distributed.broadcast_tensors(run.ema.model.state_dict().values())  # other machines may not see the file
    options = EvaluationOptions(annotations=run.truth, plots_dir=None if run.config.noplots else run.save_dir)
    metrics = evaluate(run.ema.model.deploy(), run.val_loader, options)
    if distributed.is_main():
        print(metrics.table())
        save_deployed(run, best)
        print(f"Best epoch {run.early_stop.best_epoch + 1}: {best}; last {last}; images, curves and results.csv in {run.save_dir}")
    return metrics


if __name__ == "__main__":
    sys.exit(main())
