"""From flags to a run that can start: resolves the config, builds everything, restores a resumed run, prints the recipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engine.channels import with_channels
from engine.evaluation.ground_truth import label_truth
from engine.logging.callbacks import Callback, Callbacks
from engine.logging.cost import CostLogger
from engine.logging.loggers import ConsoleLogger, CsvLogger, PlotLogger, TensorBoardLogger
from engine.logging.progress import LossMeter
from engine.logging.trackers import trackers
from engine.memory_format import channels_last
from engine.precise_batch_norm import FirstBatches
from engine.task_presets import HYPS, PRESETS, task_of, with_embedded_data, with_presets
from engine.training.batch_size import largest_batch
from engine.training.compiling import compile_loss, compile_network
from engine.training.early_stop import EarlyStop
from engine.training.ema import ModelEMA
from engine.training.initial_weights import FrozenLayers, apply_frozen, check_flags, freeze, transfer_weights
from engine.training.learning_rates import multipliers, rates_line
from engine.training.nonfinite_guard import NonFiniteGuard
from engine.training.optim import GROUPS, build_optimizer, parameter_groups
from engine.training.recipes import family_hyp, find_hyp, gains_warning
from engine.training.recompute import checkpoint_activations, recomputed_parts
from engine.training.restart import resume_after_restart, write_job_id
from engine.training.resume import check_classes, check_labels, load_resumed_run, repair_weights_folder, restored_from, run_folder_of
from engine.training.run import Loaders, Progress, Run, restore, snapshot
from engine.training.saving import save_last
from engine.training.schedule import Schedule
from engine.training.step import TrainingState, TrainingStep
from models.assigners.autoanchor import sizes_in_training
from models.build import build_model
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, require_plugins
from models.checkpoints.published import ensure_weights
from models.edit.graph_table import write_spec
from models.edit.rows import Edited, edit
from models.heads.base import Loss
from models.model import Model
from models.spec.parser import load_spec, plan_layers
from models.spec.registry import load_plugin
from tasks import Task
from utils import distributed
from utils.cli.sizes import multiple_of_stride
from utils.config import AUTO, FIND_BATCH_SIZE, Hyperparameters, TrainConfig
from utils.errors import UserError
from utils.precision import gradient_scaler, precision_of
from utils.run_folders import RunLock, new_run_dir

if TYPE_CHECKING:
    from data.dataset_spec import DatasetSpec

DEMO = PRESETS["detect"].flags  # what `python train.py` and `make demo` train: a few minutes on two CPU cores


def resolve_config(config: TrainConfig, lock: RunLock | None = None) -> tuple[TrainConfig, Checkpoint | None]:
    """Fills in what was not given: the stored flags of a resumed run, the preset of a task, the embedded data set.

    Args:
        lock: takes the folder of a resumed run, before its checkpoint is read.

    Returns:
        The config, and the checkpoint of --resume or --weights if there is one.

    Raises:
        UserError: flags that contradict each other, or a checkpoint that cannot be read.
    """
    if config.evolve:
        raise UserError("evolve: is many trainings, not one; call engine.training.evolve.evolve(config, train)")
    config = resume_after_restart(config)
    if config.resume:
        return load_resumed_run(config, lock)
    config = with_presets(config)
    check_flags(config)
    ensure_weights(config.weights, download=config.download)
    checkpoint = load_checkpoint(config.weights) if config.weights else None
    if config.task or not config.data:
        config = with_embedded_data(config, task_of(config, checkpoint))
    return config, checkpoint


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


def with_task_defaults(config: TrainConfig, task: Task) -> TrainConfig:
    """The config with the task's usual image size where none is given.

    Raises:
        UserError: a flag about places of objects, and the task's results are of whole images.
    """
    if task.whole_image and (flag := "--rect" if config.rect else "--noautoanchor" if config.noautoanchor else ""):
        raise UserError(f"{flag}: is about boxes in images, and the task {task.name!r} has one result an image; leave it out")
    is_given = config.resume or "imgsz" in config.given or config.imgsz != TrainConfig().imgsz
    if is_given or config.imgsz == task.defaults.imgsz:
        return config
    if distributed.is_main():
        print(f"No --imgsz: {task.defaults.imgsz} px, as is usual for the task {task.name}")
    return config.replace(imgsz=task.defaults.imgsz)


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


def resolve_batch_size(config: TrainConfig, model: Model, hyp: Hyperparameters, spec: DatasetSpec) -> TrainConfig:
    """The config with the largest batch that fits into memory, where --batch-size asks for it."""
    from data.labels.files import list_images

    if config.batch_size != FIND_BATCH_SIZE:
        return config
    device = next(model.parameters()).device
    return config.replace(batch_size=largest_batch(model, config, hyp, device, images=len(list_images(spec.sources("train")))))


def fit_anchors(model: Model, config: TrainConfig, hyp: Hyperparameters, loaders: Loaders) -> None:
    """Adapts anchors to the training boxes unless --noautoanchor is given, and prints a line; nothing for heads without anchors."""
    if model.task.whole_image:
        return
    dataset = loaders.train.dataset
    sizes = sizes_in_training(*dataset.box_sizes(), dataset.imgsz)
    adapted = model.head.fit_boxes(sizes, hyp, seed=config.seed, adapt=not config.noautoanchor)
    print(adapted if distributed.is_main() else "", end="\n" if adapted else "")


def build_schedule(config: TrainConfig, hyp: Hyperparameters, *, batches: int) -> Schedule:
    """Learning rate, momentum and accumulation for epochs of so many batches."""
    return Schedule(hyp, config.schedule, config.epochs, batches, config.batch_size, config.accumulate)


def build_state(
    model: Model, frozen: FrozenLayers, config: TrainConfig, hyp: Hyperparameters, *, scaler: torch.amp.GradScaler, batches: int
) -> TrainingState:
    """The model with the weights of the main rank, and its moving average, loss and optimizer.

    Args:
        batches: of an epoch.
    """
    distributed.broadcast_tensors(model.state_dict().values())
    ema = ModelEMA(model)  # of the model before --sync-bn changes its layers
    loss = model.head.build_loss(hyp)
    network = wrap_network(model, config, loss)
    optimizer = build_optimizer(
        model,
        hyp,
        name=config.optimizer,
        batch_size=config.batch_size,
        accumulate=build_schedule(config, hyp, batches=batches).full_accumulate,
        multipliers=multipliers(model, config.lr_mult),
    )
    return TrainingState(model, network, frozen, loss, ema, optimizer, scaler)


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


def build_network(config: TrainConfig, checkpoint: Checkpoint | None, spec: DatasetSpec) -> tuple[Model, FrozenLayers]:
    """The network for the data's classes from --cfg or from the checkpoint, with what --attention inserts and transferred weights; and
    what of it is frozen.

    Raises:
        UserError: the model YAML, the checkpoint or --attention cannot be used.
    """
    for path in config.plugins:
        load_plugin(path)
    if checkpoint is not None:
        require_plugins(checkpoint, config.plugins, source=config.resume or config.weights)
    if config.resume:
        with restored_from(config.resume):
            return rebuild_network(config, checkpoint, spec)
    if checkpoint is not None and not (checkpoint.cfg or config.cfg):
        raise UserError(f"{config.weights}: bare weights of a network that is not recognised; give its model YAML with --cfg")
    model = Model(insert_attention(config, config.cfg or stored_spec(checkpoint), spec).spec, names=spec.names)
    for doubt in model.doubts() if distributed.is_main() else ():
        print(f"warning: {doubt}", file=sys.stderr)
    return model, freeze(model, config, transfer_weights(model, config, checkpoint))


def rebuild_network(config: TrainConfig, checkpoint: Checkpoint | None, spec: DatasetSpec) -> tuple[Model, FrozenLayers]:
    """The network of a resumed run, with its weights, and what of it is frozen."""
    assert checkpoint is not None
    assert checkpoint.training is not None
    model = build_model(stored_spec(checkpoint), nc=spec.nc, ch=spec.ch, names=spec.names)  # including inserted attention
    model.load_state_dict(checkpoint.training["model"])
    if "frozen" not in checkpoint.training:  # a file older than --freeze pretrained
        return model, freeze(model, config, ())
    frozen = FrozenLayers.from_dict(checkpoint.training["frozen"])
    apply_frozen(model, frozen)
    return model, frozen


def stored_spec(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The YAML in a checkpoint."""
    return {**checkpoint.cfg, "yaml_file": checkpoint.cfg_name} if checkpoint else {}


def insert_attention(config: TrainConfig, cfg: str | Mapping[str, Any], spec: DatasetSpec) -> Edited:
    """The model YAML ``cfg`` with the rows that --attention inserts.

    Raises:
        UserError: the YAML is wrong, or what --attention names cannot be inserted.
    """
    base = load_spec(cfg, nc=spec.nc, ch=spec.ch, keypoints=spec.keypoints)
    plan_layers(base)  # an error of the file itself is not attributed to --attention
    try:
        change = edit(base, insert=config.attention, init=config.attention_init)
    except UserError as error:
        raise UserError(f"--attention: {error}") from error
    for line in change.changes if distributed.is_main() else ():
        print(f"--attention: {line}")
    return change


def describe_model(config: TrainConfig) -> list[str]:
    """The comment at the head of a run's model.yaml."""
    source = config.cfg or config.weights or config.resume
    how = f" (start: {config.attention_init})" if config.attention_init else ""
    return [f"The network of this run, for --cfg: {source}{' with ' if config.attention else ''}{', '.join(config.attention)}{how}"]


def resolve_hyp(config: TrainConfig, checkpoint: Checkpoint | None, model: Model) -> Hyperparameters:
    """The hyper-parameters: of the resumed run, as given, or of the model's family; flags override single values."""
    if config.resume and checkpoint is not None:
        return Hyperparameters.from_dict(checkpoint.hyp, source=f"{config.resume} (hyp)")
    if isinstance(config.hyp, Hyperparameters):
        hyp = config.hyp
    else:
        family = family_hyp(model.spec.origin, model.spec.dialect, model.head.anchor_based, scale=model.spec.scale)
        family = model.task.defaults.hyp or family
        if not config.hyp:
            print(f"No --hyp: {family}, the recipe of this model's {'task' if model.task.defaults.hyp else 'family'}")
        hyp = Hyperparameters.from_yaml(find_hyp(config.hyp or family, HYPS))
    flags = {name: getattr(config, name) for name in ("label_smoothing", "close_mosaic", "mask_ratio", "overlap_mask")}
    return hyp.replace(**{k: v for k, v in flags.items() if v is not None})


def resolve_optimizer(config: TrainConfig, hyp: Hyperparameters) -> tuple[TrainConfig, Hyperparameters]:
    """Both with the optimizer that will be used: that of the flag, or for ``auto`` that of the recipe, of which a line says so."""
    name = hyp.optimizer if config.optimizer == AUTO else config.optimizer
    if config.optimizer == AUTO and name != Hyperparameters.optimizer and distributed.is_main():
        print(f"No --optimizer: {name}, the recipe's")
    return config.replace(optimizer=name), hyp.replace(optimizer=name)


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


def wrap_network(model: Model, config: TrainConfig, loss: Loss) -> nn.Module:
    """The model as it is called in training: with synchronized batch norms, recomputed activations, gradients averaged over ranks, and
    compiled, each where configured. Its parameters are the model's own."""
    network: nn.Module = model
    device = next(model.parameters()).device
    if config.sync_bn:
        distributed.convert_sync_batchnorm(model, device)
    if config.checkpoint_activations != "off":
        print(f"memory    {checkpoint_activations(model, config.checkpoint_activations)}")
    if distributed.is_distributed():
        network = nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if config.compile:
        varied, recomputed = config.multi_scale or config.rect, config.checkpoint_activations != "off"
        called = model if recomputed else network  # torch.compile cannot split a DDP graph with activation checkpoints
        if compile_network(called, device, sizes_vary=varied, recomputed=recomputed):
            compile_loss(loss, device, sizes_vary=varied)
    return network


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
