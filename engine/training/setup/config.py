"""From flags to what a run is given: the resolved config and the hyper-parameters."""

from __future__ import annotations

from engine.task_presets import HYPS, PRESETS, task_of, with_embedded_data, with_presets
from engine.training.initial_weights import check_flags
from engine.training.recipes import family_hyp, find_hyp
from engine.training.restart import resume_after_restart
from engine.training.resume import load_resumed_run
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint
from models.checkpoints.published import ensure_weights
from models.model import Model
from tasks import Task
from utils import distributed
from utils.config import AUTO, Hyperparameters, TrainConfig
from utils.errors import UserError
from utils.run_folders import RunLock

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
