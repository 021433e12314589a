"""From flags to a run that can start: settles what was not given, builds everything, restores a stopped run, prints the recipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from engine.channels import with_channels
from engine.evaluation.ground_truth import label_truth
from engine.logging.callbacks import Callback, Callbacks
from engine.logging.loggers import CsvLogger, PlotLogger, TensorBoardLogger
from engine.logging.progress import LossMeter
from engine.logging.trackers import trackers
from engine.memory_format import channels_last
from engine.micro_batches import TrainingMicroBatches
from engine.training.batch_size import largest_batch
from engine.training.compiling import compile_network
from engine.training.early_stop import EarlyStop
from engine.training.ema import ModelEMA
from engine.training.initial_weights import FrozenLayers, apply, carry_over, check_flags, freeze
from engine.training.learning_rates import multipliers, rates_line
from engine.training.nonfinite_guard import NonFiniteGuard
from engine.training.optim import GROUPS, build_optimizer, parameter_groups
from engine.training.recipes import family_hyp, find_hyp, gains_warning
from engine.training.recompute import checkpoint_activations, recomputed_parts
from engine.training.restart import continued, mark
from engine.training.resume import repair_weights_folder, resumed
from engine.training.run import Run, restore, snapshot
from engine.training.saving import save_last
from engine.training.schedule import Schedule
from models.assigners.autoanchor import sizes_in_training
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, require_plugins
from models.checkpoints.published import ensure_weights
from models.edit.graph_table import write_spec
from models.edit.rows import Edited, edit
from models.model import Model, build_model
from models.spec.parser import load_spec, plan_layers
from models.spec.registry import load_plugin
from utils import distributed
from utils.cli.flags import multiple_of_stride
from utils.config import FIND_BATCH_SIZE, Hyperparameters, TrainConfig
from utils.errors import UserError
from utils.precision import gradient_scaler, precision_of
from utils.run_folders import new_run_dir

if TYPE_CHECKING:
    from data.dataset_spec import DatasetSpec
    from data.loader import BatchLoader

EMBEDDED_DATA = "shapes.yaml"
HYPS = Path(__file__).parents[2] / "data" / "hyps"
# What `python train.py` and `make demo` train: a few minutes on two CPU cores.
DEMO: dict[str, Any] = {
    "cfg": "yolov9-t-FocalModulation.yaml",
    "data": EMBEDDED_DATA,
    "hyp": str(HYPS / "hyp.demo.yaml"),
    "imgsz": 160,
    "epochs": 16,
    "batch_size": 8,
    "optimizer": "AdamW",
    "workers": 1,
}


def resolve_config(config: TrainConfig) -> tuple[TrainConfig, Checkpoint | None]:
    """Fills what was not given: a resumed run's own flags, the demo's preset, the embedded data set."""
    if config.evolve:
        raise UserError("evolve: is many trainings, not one; call engine.training.evolve.evolve(config, train)")
    config = continued(config)
    if config.resume:
        return resumed(config)
    if not (config.cfg or config.weights):
        if config.data:
            raise UserError("give --cfg (such as yolov9-t-FocalModulation.yaml) or --weights: what should be trained on --data?")
        defaults = TrainConfig()
        preset = {k: v for k, v in DEMO.items() if getattr(config, k) == getattr(defaults, k)}
        print(f"Neither --cfg nor --weights: the demo's preset ({', '.join(f'{k} {v}' for k, v in preset.items())})")
        config = config.replace(**preset)
    if not config.data:
        print(f"warning: no --data, so the embedded data set {EMBEDDED_DATA} is used", file=sys.stderr)
        config = config.replace(data=EMBEDDED_DATA)
    check_flags(config)
    ensure_weights(config.weights, download=config.download)
    return config, load_checkpoint(config.weights) if config.weights else None


def build_run(config: TrainConfig, checkpoint: Checkpoint | None, device: torch.device, observers: Sequence[Callback] = ()) -> Run:
    """Builds everything a run works with, restores it after a resume, and prints the recipe."""
    from data.dataset_spec import load_dataset_spec
    from data.labels.files import list_images

    precision = precision_of(config.amp, device)
    spec = with_channels(load_dataset_spec(config.data, single_cls=config.single_cls), config, checkpoint)
    model, frozen = build(config, checkpoint, spec)
    model = channels_last(model.to(device))
    hyp = recipe(config, checkpoint, model)
    recomputed_parts(model, config.checkpoint_activations)  # refuses before there is a folder
    save_dir = run_folder(config)
    if config.batch_size == FIND_BATCH_SIZE:
        config = config.replace(batch_size=largest_batch(model, config, hyp, device, images=len(list_images(spec.sources("train")))))
    train_loader, val_loader = loaders(config, hyp, spec, stride=model.stride)
    report_data(train_loader, val_loader, spec, save_dir)
    if not config.resume:
        sizes = sizes_in_training(*train_loader.dataset.box_sizes(), train_loader.dataset.imgsz)
        adapted = model.head.fit_boxes(sizes, hyp, seed=config.seed, adapt=not config.noautoanchor)  # empty for heads without anchors
        print(adapted if distributed.is_main() else "", end="\n" if adapted else "")
    distributed.broadcast_tensors(model.state_dict().values())
    ema = ModelEMA(model)  # of the model before --sync-bn changes its layers
    loss, scaler = model.head.build_loss(hyp), gradient_scaler(device, precision)
    patience = 0 if config.skip_nan else config.nan_patience
    network = network_of(model, config, device)
    guard = NonFiniteGuard(model, loss.names, patience=patience, folder=save_dir, scaled=scaler.is_enabled())
    schedule = Schedule(hyp, config.schedule, config.epochs, len(train_loader), config.batch_size, config.accumulate)
    run = Run(
        config=config,
        hyp=hyp,
        device=device,
        save_dir=save_dir,
        model=model,
        frozen=frozen,
        network=network,
        loss=loss,
        ema=ema,
        optimizer=build_optimizer(
            model, hyp, name=config.optimizer, batch_size=config.batch_size, accumulate=schedule.full_accumulate,
            multipliers=multipliers(model, config.lr_mult),
        ),
        scaler=scaler,
        precision=precision,
        schedule=schedule,
        train_loader=train_loader,
        val_loader=val_loader,
        early_stop=EarlyStop(config.patience),
        callbacks=Callbacks([*default_callbacks(config, hyp, train_loader), *observers], is_main=distributed.is_main()),
        guard=guard,
        micro_batches=TrainingMicroBatches(model, loss, guard, device),
        meter=LossMeter(loss.names, finite_only=True),
        truth=label_truth(spec, "val", val_loader.dataset.image_files),
        class_ap=(0.0,) * model.nc if config.image_weights else None,
    )
    if config.resume and checkpoint is not None:
        restore(run, checkpoint)
    run.agree()
    if distributed.is_main():
        write_run_files(run, checkpoint)
        print_recipe(run)
    return run


def write_run_files(run: Run, checkpoint: Checkpoint | None) -> None:
    """What stands in the run's folder before the first step.

    Raises:
        UserError: the folder cannot be written.
    """
    config, folder = run.config, run.save_dir
    try:
        config.to_yaml(folder / "opt.yaml")
        run.hyp.to_yaml(folder / "hyp.yaml")
        write_spec(folder / "model.yaml", run.model.spec, notes=model_notes(config))
        if config.resume and checkpoint is not None:
            repair_weights_folder(folder / "weights", Path(config.resume), checkpoint)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    if not (config.resume or config.nosave):  # at once: a full disk shows before the first epoch, and a kill in it leaves a file
        save_last(run, snapshot(run))


def build(config: TrainConfig, checkpoint: Checkpoint | None, spec: DatasetSpec) -> tuple[Model, FrozenLayers]:
    """The network for the data's classes, and what of it is not trained: from --cfg, or from the checkpoint, with what --attention
    inserts; weights are carried over by structure."""
    for path in config.plugins:
        load_plugin(path)
    if checkpoint is not None:
        require_plugins(checkpoint, config.plugins, source=config.resume or config.weights)
    if config.resume:
        return stopped(config, checkpoint, spec)
    if checkpoint is not None and not (checkpoint.cfg or config.cfg):
        raise UserError(f"{config.weights}: bare weights of a network that is not recognised; give its model YAML with --cfg")
    model = Model(edited(config, config.cfg or as_stored(checkpoint), spec).spec, names=spec.names)
    return model, freeze(model, config, carry_over(model, config, checkpoint))


def stopped(config: TrainConfig, checkpoint: Checkpoint | None, spec: DatasetSpec) -> tuple[Model, FrozenLayers]:
    """The network of a run that goes on, as it was."""
    assert checkpoint is not None
    assert checkpoint.training is not None
    model = build_model(as_stored(checkpoint), nc=spec.nc, ch=spec.ch, names=spec.names)  # with what was inserted
    model.load_state_dict(checkpoint.training["model"])
    if "frozen" not in checkpoint.training:  # a file from before there was "pretrained"
        return model, freeze(model, config, ())
    frozen = FrozenLayers.from_dict(checkpoint.training["frozen"])
    apply(model, frozen)
    return model, frozen


def as_stored(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The YAML in a checkpoint."""
    return {**checkpoint.cfg, "yaml_file": checkpoint.cfg_name} if checkpoint else {}


def edited(config: TrainConfig, cfg: str | Mapping[str, Any], spec: DatasetSpec) -> Edited:
    """The rows of ``cfg`` with what --attention inserts."""
    base = load_spec(cfg, nc=spec.nc, ch=spec.ch)
    plan_layers(base)  # a file that is wrong by itself is not --attention's doing
    try:
        change = edit(base, insert=config.attention, init=config.attention_init)
    except UserError as error:
        raise UserError(f"--attention: {error}") from error
    for line in change.changes if distributed.is_main() else ():
        print(f"--attention: {line}")
    return change


def model_notes(config: TrainConfig) -> list[str]:
    """The head of a run's model.yaml."""
    source = config.cfg or config.weights or config.resume
    how = f" (start: {config.attention_init})" if config.attention_init else ""
    return [f"The network of this run, for --cfg: {source}{' with ' if config.attention else ''}{', '.join(config.attention)}{how}"]


def recipe(config: TrainConfig, checkpoint: Checkpoint | None, model: Model) -> Hyperparameters:
    """The hyper-parameters: a resumed run's, those given, or those of the model's family; with what the flags say instead."""
    if config.resume and checkpoint is not None:
        return Hyperparameters.from_dict(checkpoint.hyp, source=f"{config.resume} (hyp)")
    if isinstance(config.hyp, Hyperparameters):
        hyp = config.hyp
    else:
        family = family_hyp(model.spec.origin, model.spec.dialect, model.head.anchor_based)
        if not config.hyp:
            print(f"No --hyp: {family}, the recipe of this model's family")
        hyp = Hyperparameters.from_yaml(find_hyp(config.hyp or family, HYPS))
    flags = {"label_smoothing": config.label_smoothing, "close_mosaic": config.close_mosaic}
    return hyp.replace(**{k: v for k, v in flags.items() if v is not None})


def run_folder(config: TrainConfig) -> Path:
    """A new folder (a resumed run's own), made by the main process and known to all."""
    folder: Path | None = None
    if distributed.is_main():
        last = Path(config.resume).absolute()
        if config.resume and last.parent.name == "weights":
            folder = last.parent.parent
        else:
            folder = new_run_dir(config.project, config.name, exist_ok=config.exist_ok)
        try:
            (folder / "weights").mkdir(exist_ok=True)
            mark(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error}); give another --project or --name") from None
    return cast("Path", distributed.broadcast_object(folder))


def loaders(config: TrainConfig, hyp: Hyperparameters, spec: DatasetSpec, *, stride: int) -> tuple[BatchLoader, BatchLoader]:
    """Training and validation batches; a process of each machine reads the labels first, so that the others find its cache."""
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
        mosaic_until=config.epochs - hyp.close_mosaic, prefix="train: ", **shared,
    )  # fmt: skip
    val_options = LoaderOptions(
        imgsz=val_px, batch_size=config.batch_size * 2, augment=False, rect=True, pad=0.5, prefix="val: ", **shared
    )  # fmt: skip
    with distributed.local_main_first():
        return build_loader(spec, "train", train_options), build_loader(spec, "val", val_options)


def report_data(train_loader: BatchLoader, val_loader: BatchLoader, spec: DatasetSpec, folder: Path) -> None:
    """What the labels, read by now, say about the data as a whole, in a few lines; every problem goes into a file of the run's folder."""
    from data.labels.problems import write_problems
    from data.tools.summary import summarize_labels

    if not distributed.is_main():
        return
    train, val = train_loader.dataset, val_loader.dataset
    print("\n".join(summarize_labels((train.image_files, train.table), (val.image_files, val.table), spec.names)))
    problems = list(dict.fromkeys((*train.problems, *val.problems)))
    if problems:
        try:
            write_problems(folder / "data_problems.txt", problems)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
        print(f"data      {len(problems)} problems, all in {folder / 'data_problems.txt'}; python -m data.check looks closer")


def network_of(model: Model, config: TrainConfig, device: torch.device) -> nn.Module:
    """The model as it is called in training: averaging gradients over processes, compiled if so asked. Parameters are the model's own."""
    network: nn.Module = model
    if config.sync_bn:
        distributed.convert_sync_batchnorm(model, device)
    if config.checkpoint_activations != "off":
        print(f"memory    {checkpoint_activations(model, config.checkpoint_activations)}")
    if distributed.is_distributed():
        network = nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if config.compile:
        varied, recomputed = config.multi_scale or config.rect, config.checkpoint_activations != "off"
        called = model if recomputed else network  # its splitting for processes knows no checkpoints
        compile_network(called, device, sizes_vary=varied, recomputed=recomputed)
    return network


def default_callbacks(config: TrainConfig, hyp: Hyperparameters, loader: BatchLoader) -> list[Callback]:
    """What writes results.csv, TensorBoard events and images, and what --logger asks for."""
    asked = trackers(config.logger if distributed.is_main() else (), config.project, {**config.to_dict(), **hyp.to_dict()})
    return [CsvLogger(), TensorBoardLogger(), *([] if config.noplots else [PlotLogger(loader.dataset.labels)]), *asked]


def print_recipe(run: Run) -> None:
    """What will happen, in a few lines, before it does."""
    config, hyp, schedule = run.config, run.hyp, run.schedule
    groups = {name: len(parameters) for name, parameters in parameter_groups(run.model).items()}
    parameters = sum(p.numel() for p in run.model.parameters())
    warmup, total = schedule.warmup_iterations, config.epochs * schedule.iterations
    print(f"model     {run.model.spec.origin}, {len(run.model.model)} layers, {parameters / 1e6:.2f} M parameters, {run.model.nc} classes")
    last_lr = schedule.at(config.epochs - 1, schedule.iterations - 1).lr
    print(f"recipe    {hyp.source or 'given in Python'}; {config.optimizer} lr {hyp.lr0:g}, {config.schedule} to {last_lr:.2g}")
    print(f"groups    {', '.join(f'{groups[name]} tensors {name}' for name in GROUPS)}")
    if config.lr_mult:
        print(f"rates     {rates_line(run.model, config.lr_mult)}")
    print(f"batch     {config.batch_size} x {schedule.full_accumulate} accumulated = {schedule.effective_batch} (nominal {hyp.nbs})")
    share = f"{warmup} of {total} iterations ({warmup / schedule.iterations:.1f} epochs of {schedule.iterations})"
    print(f"warm-up   {share if warmup else 'none'}")
    if 2 * warmup > total:
        print("warning: warm-up is more than half of the training: lower warmup_epochs and warmup_min_iters in --hyp", file=sys.stderr)
    if warning := gains_warning(hyp.box, run.model.head.anchor_based):
        print(warning, file=sys.stderr)
    amp = str(run.precision).removeprefix("torch.") if run.precision else "off"
    print(f"device    {run.device}, {distributed.world_size()} process(es), amp {amp}, seed {config.seed}")
    print(f"results   {run.save_dir}")
