"""Published classification weights of FocalNet, BiFormer and CloFormer for the stages that are rows of a network.

Their repositories publish whole classifiers; the key names say which network a file is of. Its stages go, in order, to the rows of that
name, wherever those are; the classifier is left out.
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
from models.transfer.report import TransferReport
from models.transfer.transfer import fill_rows
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
    """Fills the backbone of ``model``, in place, from a published file. Raises UserError where the two do not belong together."""
    weights = load_checkpoint(path).weights
    check_weights(weights, f"--backbone-weights {path}")
    return fill_backbone(model, weights, origin=str(path))


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
    rest = sum(value.numel() for value in weights.values()) - sum(value.numel() for value in placed.values())
    return fill_rows(model, placed, origin=origin, rows=places, left_out={"the classifier and stages without a row": rest})


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
