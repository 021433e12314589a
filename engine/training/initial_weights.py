"""Initial weights: transferred from a checkpoint or a published backbone, and ``--freeze``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.sound_weights import check_weights
from models.model import Model
from models.transfer.backbone_weights import load_backbone
from models.transfer.report import TransferReport, check_report_path
from models.transfer.transfer import Source, transfer
from utils import distributed
from utils.config import TrainConfig
from utils.errors import UserError


class FrozenLayers(NamedTuple):
    """What is not trained: names of parameters, and rows whose running statistics are frozen too."""

    parameters: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) for name, value in self._asdict().items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FrozenLayers:
        return cls(tuple(values["parameters"]), tuple(values["rows"]))


def check_flags(config: TrainConfig) -> None:
    """Raises UserError for flags about transferred weights where none are given, before anything is built."""
    weights = config.weights or config.backbone_weights
    for flag, given in (("--freeze pretrained", config.freeze_pretrained), ("--weights-report", config.weights_report)):
        if given and not weights:
            raise UserError(f"{flag}: is about weights that are carried over; give them with --weights or --backbone-weights")
    if config.weights_report:
        check_report_path(config.weights_report)


def transfer_weights(model: Model, config: TrainConfig, checkpoint: Checkpoint | None) -> list[TransferReport]:
    """Fills ``model`` from the checkpoint of --weights, then its backbone from --backbone-weights; prints and writes the reports."""
    reports = []
    if checkpoint is not None:
        check_weights(checkpoint.weights, str(config.weights))
        source = Source(checkpoint.weights, checkpoint.cfg or None, checkpoint.names or None, str(config.weights))
        reports.append(transfer(model, source, own_anchors=bool(config.cfg)))
    if config.backbone_weights:
        reports.append(load_backbone(model, config.backbone_weights))
    if distributed.is_main():
        for report in reports:
            print(report)
            if not report.landed:
                print(f"warning: nothing of {report.origin} fits this network, which starts from scratch", file=sys.stderr)
        _write_reports(reports, config.weights_report)
    return reports


def freeze(model: Model, config: TrainConfig, reports: Iterable[TransferReport]) -> FrozenLayers:
    """Freezes what --freeze names.

    Returns:
        What is frozen, for the checkpoint: a resumed run could not derive "pretrained" from its own weights.

    Raises:
        UserError: the model has no such layer, or nothing is left to train.
    """
    if config.freeze_pretrained:
        frozen = _pretrained(model, list(reports))
    else:
        rows = config.frozen_layers
        for index in rows:
            if index >= len(model.model):
                raise UserError(f"--freeze: layer {index} is not there, the model has layers 0 to {len(model.model) - 1}")
        frozen = FrozenLayers(tuple(name for name, _ in model.named_parameters() if int(name.split(".")[1]) in rows), rows)
    apply_frozen(model, frozen)
    return frozen


def apply_frozen(model: Model, frozen: FrozenLayers) -> None:
    """Switches the gradient of the named parameters off."""
    names = set(frozen.parameters)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)


def _pretrained(model: Model, reports: list[TransferReport]) -> FrozenLayers:
    """Every parameter that was transferred completely, and the rows of which every tensor was."""
    filled = frozenset().union(*(report.filled for report in reports))
    parameters = tuple(name for name, _ in model.named_parameters() if name in filled)
    trained = [name for name, p in model.named_parameters() if name not in filled and p.requires_grad]
    if not trained:
        origins = " and ".join(report.origin for report in reports)
        raise UserError(f"--freeze pretrained: everything in {model.spec.origin} came from {origins}, so nothing is left to train")
    left = {int(name.split(".")[1]) for name in model.state_dict() if name not in filled}
    rows = {int(name.split(".")[1]) for name in model.state_dict()} - left
    if distributed.is_main():
        print(f"--freeze pretrained: {len(parameters)} tensors stay as they are ({len(rows)} rows whole), {len(trained)} are trained")
    return FrozenLayers(parameters, tuple(sorted(rows)))


def _write_reports(reports: list[TransferReport], path: str) -> None:
    """Writes the reports; that of the backbone beside the other one where there are both."""
    names = [Path(path), Path(path).with_stem(f"{Path(path).stem}-backbone")] if path else []
    for report, name in zip(reports, names):
        report.write(name)
        print(f"Report of the weights: {name}")
