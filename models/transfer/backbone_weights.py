"""Classification weights for the backbone of a network: those published of FocalNet, BiFormer and CloFormer, and any classifier's here.

Their repositories publish whole classifiers; the key names say which network a file is of. Its stages go, in order, to the rows of that
name, wherever those are; the classifier goes to a head of the same form, else it is left out. A classifier that was trained here, or by
another YOLO, gives its rows to those of the same structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.backbones import biformer, cloformer, focalnet
from models.checkpoints.checkpoint import load_checkpoint
from models.checkpoints.sound_weights import check_weights
from models.model import Model
from models.spec.parser import ModelSpec
from models.spec.registry import BLOCKS
from models.transfer.report import TransferReport
from models.transfer.transfer import Source, fill_rows, transfer
from utils.errors import UserError


@dataclass(frozen=True)
class Published:
    """One family of backbones.

    Attributes:
        marks: beginnings of names that only its files have together.
        rows: modules that its stages are in a YAML, in that order.
        to_rows: its names to those of consecutive rows.
    """

    marks: tuple[str, ...]
    rows: tuple[str, ...]
    to_rows: Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]


FAMILIES = {
    "FocalNet": Published(("patch_embed.proj.", "layers.0.blocks.0.modulation."), ("FocalNetStage",), focalnet.rows_from_published),
    "BiFormer": Published(("downsample_layers.0.", "stages.0.0.attn."), ("BiFormerStage",), biformer.rows_from_published),
    "CloFormer": Published(("patch_embed.conv1.", "layers.0."), ("CloFormerStem", "CloFormerStage"), cloformer.rows_from_published),
}


def load_backbone(model: Model, path: str | Path) -> TransferReport:
    """Fills the backbone of ``model``, in place, from a published file, or a classifier's checkpoint. Raises UserError where the two do
    not belong together."""
    checkpoint = load_checkpoint(path)
    check_weights(checkpoint.weights, f"--backbone-weights {path}")
    source = Source(checkpoint.weights, checkpoint.cfg or None, checkpoint.names or None, str(path))
    spec = source.spec()
    if spec is not None and not family_of(checkpoint.weights):
        return _from_classifier(model, source, spec)
    return fill_backbone(model, checkpoint.weights, origin=str(path))


def _from_classifier(model: Model, source: Source, spec: ModelSpec) -> TransferReport:
    """Rows of a classifier to those of the same structure; its head stays behind unless the network is a classifier too.

    Raises:
        UserError: the checkpoint is of another task, whose neck and head ``--weights`` would carry over as well.
    """
    task = BLOCKS[spec.rows[-1].module].cls.task  # type: ignore[attr-defined]
    if not task.whole_image:
        raise UserError(f"--backbone-weights {source.origin}: a network for the task {task.name!r}; give it with --weights")
    return transfer(model, source)


def fill_backbone(model: Model, weights: Mapping[str, Tensor], *, origin: str = "weights") -> TransferReport:
    """The same from a state dict.

    Raises:
        UserError: names of no known family, or a network without rows of it.
    """
    family = family_of(weights)
    if not family:
        known = ", ".join(FAMILIES)
        raise UserError(f"--backbone-weights {origin}: not the published weights of {known} (by the names of its tensors)")
    published = FAMILIES[family]
    places = [plan.index for plan in model.plans if plan.name in published.rows]
    if not places:
        own = ", ".join(dict.fromkeys(name for f in FAMILIES.values() for name in f.rows if any(p.name == name for p in model.plans)))
        raise UserError(
            f"--backbone-weights {origin}: holds {family}, but {model.spec.origin} has no row {published.rows[-1]}"
            + (f" (it has {own})" if own else f"; give a --cfg with such a backbone, as yolov8-{family}-*.yaml")
        )
    placed = _placed(published.to_rows(weights, 0), places)
    head = _classifier(model, weights)
    rest = sum(value.numel() for value in weights.values()) - sum(value.numel() for value in (placed | head).values())
    rows = [*places, model.plans[-1].index] if head else places
    return fill_rows(model, placed | head, origin=origin, rows=rows, left_out={"the classifier and stages without a row": rest})


def _classifier(model: Model, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published norm and linear layer under their names in the network's head, where that is one of this form; the latter only
    where it has as many classes."""
    last, own = model.plans[-1], model.state_dict()
    if last.name != "PooledClassify":
        return {}
    found = {f"model.{last.index}.{name}": value for name, value in weights.items() if name.startswith(("norm.", "head."))}
    fits = {name: name in own and own[name].shape == value.shape for name, value in found.items()}
    linear_fits = all(fit for name, fit in fits.items() if ".head." in name)
    return {name: value for name, value in found.items() if fits[name] and (linear_fits or ".head." not in name)}


def family_of(names: Iterable[str]) -> str:
    """The family whose names these are; empty for none."""
    names = list(names)
    fitting = (f for f, p in FAMILIES.items() if all(any(name.startswith(mark) for name in names) for mark in p.marks))
    return next(fitting, "")


def _placed(weights: Mapping[str, Tensor], places: list[int]) -> dict[str, Tensor]:
    """The k-th stage's names under the k-th place's number; stages without a place are left out."""
    placed = {}
    for name, value in weights.items():
        _, stage, rest = name.split(".", 2)
        if int(stage) < len(places):
            placed[f"model.{places[int(stage)]}.{rest}"] = value
    return placed
