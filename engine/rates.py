"""Which part of a network a parameter belongs to, and the factor that ``--lr-mult`` gives its learning rate."""

from __future__ import annotations

from collections.abc import Iterator

from models import channel_rules as rules
from models.channel_rules import LayerPlan
from models.detector import Detector
from models.layers.attention.embedded import Embedded
from models.registry import BLOCKS
from utils.errors import UserError
from utils.rates import read_multipliers, rows_of

ATTENTION = "models.layers.attention."


def multipliers(model: Detector, text: str) -> dict[str, float]:
    """Name -> factor for every trainable parameter whose learning rate is multiplied; a row's number goes before its part's name.

    Raises:
        UserError: a row is not there, or nothing trainable is in a part.
    """
    factors = read_multipliers(text)
    found: dict[str, tuple[str, float]] = {}
    for part, factor in sorted(factors.items(), key=lambda item: bool(rows_of(item[0]))):  # rows last, so that they win
        rows = rows_of(part)
        if rows and rows[-1] >= len(model.plans):
            raise UserError(f"--lr-mult {part}: row {rows[-1]} is not there, the model has rows 0 to {len(model.plans) - 1}")
        named = [name for name, row, own in _trainable(model) if row in rows or part == own]
        if not named:
            raise UserError(f"--lr-mult {part}: nothing that is trained belongs to it in {model.spec.origin}")
        found |= dict.fromkeys(named, (part, factor))
    return {name: factor for name, (_, factor) in found.items()}


def rates_line(model: Detector, text: str) -> str:
    """What the multipliers do, for the recipe."""
    found = multipliers(model, text)
    asked = ", ".join(f"{part} x {factor:g}" for part, factor in read_multipliers(text).items())
    rest = sum(1 for name, _, _ in _trainable(model) if name not in found)
    return f"{asked}: {len(found)} tensors; x 1: {rest} tensors"


def _trainable(model: Detector) -> Iterator[tuple[str, int, str]]:
    """Name, row and part of every parameter that gets a gradient."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            row = int(name.split(".", 2)[1])
            yield name, row, _part(model.plans[row], name)


def _part(plan: LayerPlan, name: str) -> str:
    """Attention rows (inserted ones always are), attention inside blocks, and else where the row stands."""
    inside = isinstance(plan.cls, Embedded)
    if (is_attention(plan) and not inside) or (inside and ".attention." in name):
        return "attention"
    if plan.section == "backbone":
        return "backbone"
    return "neck" if plan.out_channels else "head"


def is_attention(plan: LayerPlan) -> bool:
    """Whether a row is a same-width module, or another block of the attention shelf."""
    block = BLOCKS[plan.name]
    home = getattr(block.cls, "__module__", "")
    return home.startswith(ATTENTION) or (block.channels is rules.attends and not home.startswith("torch."))
