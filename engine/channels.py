"""The number of channels of a network and its images, where model YAML, data YAML and checkpoint disagree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from models.spec.parser import named_channels
from utils import distributed
from utils.errors import UserError

if TYPE_CHECKING:
    from data.dataset_spec import DatasetSpec
    from models.checkpoints.checkpoint import Checkpoint
    from utils.config import TrainConfig


def with_channels(spec: DatasetSpec, config: TrainConfig, checkpoint: Checkpoint | None) -> DatasetSpec:
    """The data set with the channels of a training: the data YAML's if it gives them, else the model's, else 3.

    Where the two disagree a line is printed.

    Raises:
        UserError: the data YAML gives another number than the resumed run has.
    """
    if config.resume and checkpoint is not None:
        return spec_for(spec, checkpoint, weights=config.resume)
    cfg = config.cfg or (checkpoint.cfg if checkpoint else {})
    named = named_channels(cfg) if cfg else None
    if spec.ch_given:
        if named not in (None, spec.ch) and distributed.is_main():
            source = config.cfg or config.weights
            print(f"channels  {spec.ch}, as {spec.yaml_path} says (ch), which decides; {source} says {named}")
        return spec
    return replace(spec, ch=named or spec.ch)


class HasChannels(Protocol):
    """A network or a checkpoint: what knows how many channels its images have."""

    @property
    def ch(self) -> int: ...


def spec_for(spec: DatasetSpec, model: HasChannels, *, weights: str | Path) -> DatasetSpec:
    """The data set with the channels of an existing model.

    Raises:
        UserError: the data YAML gives another number.
    """
    if spec.ch_given and spec.ch != model.ch:
        raise UserError(f"{spec.yaml_path}: ch: {spec.ch}, but {weights} takes {model.ch} channels; give the data set of its own")
    return replace(spec, ch=model.ch)
