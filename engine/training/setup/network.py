"""The network of a run: from a YAML or a checkpoint, with inserted attention and transferred weights, and its training state."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engine.memory_format import prefer_onednn
from engine.training.compiling import compile_loss, compile_network
from engine.training.ema import ModelEMA
from engine.training.initial_weights import FrozenLayers, apply_frozen, freeze, transfer_weights
from engine.training.learning_rates import multipliers
from engine.training.optim import build_optimizer
from engine.training.recompute import checkpoint_activations
from engine.training.resume import restored_from
from engine.training.run import Loaders
from engine.training.schedule import build_schedule
from engine.training.step import TrainingState
from models.assigners.autoanchor import sizes_in_training
from models.build import build_model
from models.checkpoints.checkpoint import Checkpoint, require_plugins
from models.edit.rows import Edited, edit
from models.heads.base import Loss
from models.model import Model
from models.spec.parser import load_spec
from models.spec.planning import plan_layers
from models.spec.registry import load_plugin
from utils import distributed
from utils.config import Hyperparameters, TrainConfig
from utils.errors import UserError

if TYPE_CHECKING:
    from data.dataset_spec import DatasetSpec


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


def fit_anchors(model: Model, config: TrainConfig, hyp: Hyperparameters, loaders: Loaders) -> None:
    """Adapts anchors to the training boxes unless --noautoanchor is given, and prints a line; nothing for heads without anchors."""
    if model.task.whole_image:
        return
    dataset = loaders.train.dataset
    sizes = sizes_in_training(*dataset.box_sizes(), dataset.imgsz)
    adapted = model.head.fit_boxes(sizes, hyp, seed=config.seed, adapt=not config.noautoanchor)
    print(adapted if distributed.is_main() else "", end="\n" if adapted else "")


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


def wrap_network(model: Model, config: TrainConfig, loss: Loss) -> nn.Module:
    """The model as it is called in training: with synchronized batch norms, recomputed activations, gradients averaged over ranks, and
    compiled, each where configured. Its parameters are the model's own."""
    network: nn.Module = model
    device = next(model.parameters()).device
    if device.type == "cpu" and not distributed.is_distributed():  # whose buckets would copy oneDNN's gradients once more
        prefer_onednn(model)  # not the moving average, which validates and is deployed
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
