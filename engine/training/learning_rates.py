"""``--lr-mult``: which part of a network a parameter belongs to, and the factor of its learning rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from torch import nn

from models.layers.attention.ops.embedded import Embedded
from models.model import Model
from models.spec import channel_rules as rules
from models.spec.channel_rules import LayerPlan
from models.spec.registry import BLOCKS, BlockSpec
from utils.errors import UserError
from utils.lr_multipliers import parse_lr_multipliers, rows_of

CLASS_RATE = 3.0  # published with MuSGD, for the class towers


def multipliers(model: Model, text: str) -> dict[str, float]:
    """Name -> factor for every trainable parameter whose learning rate is multiplied; a row's number takes precedence over its part.

    Raises:
        UserError: a row is not there, or nothing trainable is in a part.
    """
    factors = parse_lr_multipliers(text)
    return {name: factors[part] for name, part in _assigned(model, factors).items()}


def rates_line(model: Model, text: str) -> str:
    """Describes the multipliers in the printed recipe."""
    factors = parse_lr_multipliers(text)
    assigned = Counter(_assigned(model, factors).values())
    rest = sum(1 for _ in _trainable(model)) - sum(assigned.values())
    return ", ".join(f"{part} x {factor:g} ({assigned[part]} tensors)" for part, factor in factors.items()) + f", x 1 ({rest} tensors)"


def class_rates(model: nn.Module) -> dict[str, float]:
    """Name -> ``CLASS_RATE`` for every parameter of the class towers of a dense head and of its semantic branch; empty for other heads."""
    if not isinstance(model, Model):
        return {}
    row = len(model.plans) - 1
    modules = tuple(f"model.{row}.{name}." for name in model.head.class_modules())
    return {name: CLASS_RATE for name, _ in model.named_parameters() if name.startswith(modules)}


def _assigned(model: Model, factors: Mapping[str, float]) -> dict[str, str]:
    """Name of a parameter -> the given part whose factor it gets."""
    assigned: dict[str, str] = {}
    for part in sorted(factors, key=lambda part: bool(rows_of(part))):  # rows last, so that they take precedence
        rows = rows_of(part)
        if rows and rows[-1] >= len(model.plans):
            raise UserError(f"--lr-mult {part}: row {rows[-1]} is not there, the model has rows 0 to {len(model.plans) - 1}")
        named = [name for name, row, own in _trainable(model) if row in rows or part == own]
        if not named:
            raise UserError(f"--lr-mult {part}: nothing that is trained belongs to it in {model.spec.origin}")
        assigned |= dict.fromkeys(named, part)
    return assigned


def _trainable(model: Model) -> Iterator[tuple[str, int, str]]:
    """Name, row and part of every parameter that gets a gradient."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            row = int(name.split(".", 2)[1])
            yield name, row, _part(model.plans[row], name)


def _part(plan: LayerPlan, name: str) -> str:
    """``attention`` for attention rows (all inserted ones) and attention inside blocks, else the section of the row."""
    inside = isinstance(plan.cls, Embedded)
    if is_attention(BLOCKS[plan.name]) or (inside and ".attention." in name):
        return "attention"
    if plan.section == "backbone":
        return "backbone"
    return "neck" if plan.out_channels else "head"


def is_attention(block: BlockSpec) -> bool:
    """Whether a block is attention, or another same-width module, such as ``--attention`` inserts."""
    return block.kind == "attention" or (block.channels is rules.same_width and block.kind != "framework")
