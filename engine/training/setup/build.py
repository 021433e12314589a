"""From a config to a run that can start: builds everything, restores a resumed run, prints the recipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.channels import with_channels
from engine.logging.callbacks import Callback, Callbacks
from engine.logging.cost import CostLogger
from engine.logging.loggers import ConsoleLogger, CsvLogger, PlotLogger, TensorBoardLogger
from engine.logging.progress import LossMeter
from engine.logging.trackers import trackers
from engine.memory_format import channels_last
from engine.precise_batch_norm import FirstBatches
from engine.training.batch_size import largest_batch
from engine.training.early_stop import EarlyStop
from engine.training.learning_rates import rates_line
from engine.training.nonfinite_guard import NonFiniteGuard
from engine.training.optim import GROUPS, parameter_groups
from engine.training.recipes import gains_warning
from engine.training.recompute import recomputed_parts
from engine.training.restart import write_job_id
from engine.training.resume import check_labels, repair_weights_folder, restored_from, run_folder_of
from engine.training.run import Loaders, Progress, Run, restore, snapshot
from engine.training.saving import save_last
from engine.training.schedule import build_schedule
from engine.training.setup.config import resolve_hyp, resolve_optimizer, with_task_defaults
from engine.training.setup.data import build_loaders, load_data, report_data
from engine.training.setup.network import build_network, build_state, describe_model, fit_anchors
from engine.training.step import TrainingStep
from models.checkpoints.checkpoint import Checkpoint
from models.edit.graph_table import write_spec
from models.model import Model
from utils import distributed
from utils.config import FIND_BATCH_SIZE, Hyperparameters, TrainConfig
from utils.errors import UserError
from utils.precision import gradient_scaler, precision_of
from utils.run_folders import RunLock, new_run_dir

if TYPE_CHECKING:
    from data.dataset_spec import DatasetSpec


def build_run(
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    device: torch.device,
    callbacks: Sequence[Callback] = (),
    *,
    lock: RunLock | None = None,
) -> Run:
    """Builds everything a run works with, restores it after a resume, and prints the recipe.

    Args:
        config: as resolved by :func:`resolve_config`, like ``checkpoint``.
        callbacks: of the caller, after the default ones.
        lock: takes the run folder.

    Raises:
        UserError: model, data, weights or flags that cannot be used.
    """
    precision = precision_of(config.amp, device)
    spec = with_channels(load_data(config, checkpoint), config, checkpoint)
    model, frozen = build_network(config, checkpoint, spec)
    config = with_task_defaults(config, model.task)
    model = channels_last(model.to(device))
    config, hyp = resolve_optimizer(config, resolve_hyp(config, checkpoint, model))
    recomputed_parts(model, config.checkpoint_activations)  # refuses the flag before a folder is made
    save_dir = make_run_folder(config, lock)
    config = resolve_batch_size(config, model, hyp, spec)
    loaders = build_loaders(config, hyp, spec, task=model.task, stride=model.stride, finish_on_device=device.type == "cuda")
    if config.resume and checkpoint is not None:
        check_labels(loaders.origin, checkpoint, config)
    report_data(loaders, spec, save_dir, whole_images=model.task.whole_image)
    if not config.resume:
        fit_anchors(model, config, hyp, loaders)
    state = build_state(model, frozen, config, hyp, scaler=gradient_scaler(device, precision), batches=len(loaders.train))
    patience = 0 if config.skip_nan else config.nan_patience
    guard = NonFiniteGuard(model, state.loss.names, patience=patience, folder=save_dir, scaled=state.scaler.is_enabled())
    schedule = build_schedule(config, hyp, batches=len(loaders.train))
    run = Run(
        config=config,
        hyp=hyp,
        device=device,
        save_dir=save_dir,
        loaders=loaders,
        state=state,
        step=TrainingStep(state, schedule, guard, config, clip_norm=hyp.clip_norm, device=device, precision=precision),
        progress=Progress(EarlyStop(config.patience), class_ap=(0.0,) * model.nc if config.image_weights else None),
        meter=LossMeter(state.loss.names, finite_only=True),
        callbacks=Callbacks([*default_callbacks(config, hyp, loaders), *callbacks], is_main=distributed.is_main()),
        first_batches=FirstBatches(config.precise_bn),
    )
    if config.resume and checkpoint is not None:
        with restored_from(config.resume):
            restore(run, checkpoint)
    run.gather_rank_states()
    if distributed.is_main():
        write_run_files(run, checkpoint)
        print_recipe(run)
    return run


def make_run_folder(config: TrainConfig, lock: RunLock | None = None) -> Path:
    """Makes a new run folder, or takes that of the resumed run, on the main rank; all ranks get its path.

    Raises:
        UserError: the folder cannot be written, or another process writes it.
    """
    folder: Path | None = None
    if distributed.is_main():
        resumed = run_folder_of(config.resume)
        folder = resumed or new_run_dir(config.project, config.name, exist_ok=config.exist_ok)
        if lock is not None:
            lock.take(folder, is_new=not (resumed or config.exist_ok), job=distributed.job_id())
        try:
            (folder / "weights").mkdir(exist_ok=True)
            write_job_id(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error}); give another --project or --name") from None
    folder = distributed.broadcast_object(folder)
    assert folder is not None
    return folder


def resolve_batch_size(config: TrainConfig, model: Model, hyp: Hyperparameters, spec: DatasetSpec) -> TrainConfig:
    """The config with the largest batch that fits into memory, where --batch-size asks for it."""
    from data.labels.files import list_images

    if config.batch_size != FIND_BATCH_SIZE:
        return config
    device = next(model.parameters()).device
    return config.replace(batch_size=largest_batch(model, config, hyp, device, images=len(list_images(spec.sources("train")))))


def write_run_files(run: Run, checkpoint: Checkpoint | None) -> None:
    """Writes the files of the run folder that exist before the first step.

    Raises:
        UserError: the folder cannot be written.
    """
    config, folder = run.config, run.save_dir
    try:
        config.to_yaml(folder / "opt.yaml", absolute={**config.absolute_paths(), "data": run.loaders.origin["file"]})
        run.hyp.to_yaml(folder / "hyp.yaml")
        write_spec(folder / "model.yaml", run.state.model.spec, notes=describe_model(config))
        if config.resume and checkpoint is not None:
            repair_weights_folder(folder / "weights", Path(config.resume), checkpoint)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    if not (config.resume or config.nosave):  # a full disk is found early, and a run killed in its first epoch can resume
        save_last(run, snapshot(run))


def default_callbacks(config: TrainConfig, hyp: Hyperparameters, loaders: Loaders) -> list[Callback]:
    """The loggers of the console, results.csv, cost.json, TensorBoard events and plots, and those that --logger names."""
    tracking = trackers(config.logger if distributed.is_main() else (), config.project, {**config.to_dict(), **hyp.to_dict()})
    plots = [] if config.noplots else [PlotLogger(loaders.train.dataset.labels, whole_images=loaders.train.dataset.task.whole_image)]
    return [ConsoleLogger(), CsvLogger(), CostLogger(), TensorBoardLogger(), *plots, *tracking]


def print_recipe(run: Run) -> None:
    """Prints in a few lines what will be trained and how."""
    config, hyp, schedule, model = run.config, run.hyp, run.step.schedule, run.state.model
    groups = {name: len(parameters) for name, parameters in parameter_groups(model).items()}
    parameters = sum(p.numel() for p in model.parameters())
    warmup, total = schedule.warmup_iterations, config.epochs * schedule.iterations
    scale = f" at scale {model.spec.scale}" if model.spec.scale else ""
    print(f"model     {model.spec.origin}{scale}, {len(model.model)} layers, {parameters / 1e6:.2f} M parameters, {model.nc} classes")
    last_lr = schedule.at(config.epochs - 1, schedule.iterations - 1).lr
    print(f"recipe    {hyp.source or 'given in Python'}; {config.optimizer} lr {hyp.lr0:g}, {config.schedule} to {last_lr:.2g}")
    print(f"groups    {', '.join(f'{groups[name]} tensors {name}' for name in GROUPS)}")
    if config.lr_mult:
        print(f"rates     {rates_line(model, config.lr_mult)}")
    print(f"batch     {config.batch_size} x {schedule.full_accumulate} accumulated = {schedule.effective_batch} (nominal {hyp.nbs})")
    share = f"{warmup} of {total} iterations ({warmup / schedule.iterations:.1f} epochs of {schedule.iterations})"
    print(f"warm-up   {share if warmup else 'none'}")
    if 2 * warmup > total:
        print("warning: warm-up is more than half of the training: lower warmup_epochs and warmup_min_iters in --hyp", file=sys.stderr)
    if not model.task.whole_image and (warning := gains_warning(hyp.box, model.head.anchor_based)):
        print(warning, file=sys.stderr)
    precision = run.step.precision
    amp = str(precision).removeprefix("torch.") if precision else "off"
    print(f"device    {run.device}, {distributed.world_size()} process(es), amp {amp}, seed {config.seed}")
    print(f"results   {run.save_dir}")
