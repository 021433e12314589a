"""Which number of channels a network and its images have, where model YAML, data YAML and checkpoint say different things."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from models.spec.parser import named_channels
from utils import distributed
from utils.errors import UserError

if TYPE_CHECKING:
    from data.dataset_spec import DatasetSpec
    from models.checkpoints.checkpoint import Checkpoint
    from models.export.model import ExportedModel
    from models.model import Model
    from utils.config import TrainConfig


def with_channels(spec: DatasetSpec, config: TrainConfig, checkpoint: Checkpoint | None) -> DatasetSpec:
    """The data set with the channels that a training reads and builds for: the data YAML's if it names them, else the model's, else 3.

    A disagreement between the two is one line.

    Raises:
        UserError: The data YAML names others than the run that goes on.
    """
    if config.resume and checkpoint is not None:
        return spec_for(spec, checkpoint, weights=config.resume)
    cfg = config.cfg or (checkpoint.cfg if checkpoint else {})
    named = named_channels(cfg) if cfg else None
    if spec.ch_given:
        if named not in (None, spec.ch) and distributed.is_main():
            said_by = config.cfg or config.weights
            print(f"channels  {spec.ch}, as {spec.yaml_path} says (ch), which decides; {said_by} says {named}")
        return spec
    return replace(spec, ch=named or spec.ch)


def spec_for(spec: DatasetSpec, model: Model | ExportedModel | Checkpoint, *, weights: str | Path) -> DatasetSpec:
    """The data set read with the channels of a model that is there already.

    Raises:
        UserError: The data YAML names others.
    """
    if spec.ch_given and spec.ch != model.ch:
        raise UserError(f"{spec.yaml_path}: ch: {spec.ch}, but {weights} takes {model.ch} channels; give the data set of its own")
    return replace(spec, ch=model.ch)
