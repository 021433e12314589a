"""What whole published networks have in common: their entry in the registry, and stochastic depth over their blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from models.spec.channel_rules import ChannelRule, LayerPlan, RuleContext
from utils.errors import UserError


def listed_by_stage(config: str) -> ChannelRule:
    """Channel rule of a whole backbone, which cannot be a row: raises a UserError that names the configuration with its stages as rows.

    Args:
        config: name of a YAML that lists the backbone's stages.
    """

    def rule(args: Sequence[Any], context: RuleContext) -> LayerPlan:
        raise UserError(f"is a whole network with several outputs; list its stages as rows, as {config} does")

    rule.__name__ = "listed_by_stage"
    return rule


def ramp(first: float, last: float, count: int) -> list[float]:
    """``count`` rates from ``first`` to ``last`` in equal steps; a single one is ``first``."""
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


def ends(rate: float | Sequence[float]) -> tuple[float, float]:
    """First and last rate of a stage, of one number or two."""
    return (rate, rate) if isinstance(rate, (int, float)) else (rate[0], rate[-1])


def rename_prefixes(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Entries whose key begins with one of ``prefixes``, under the new beginning; the others are left out."""
    return {new + key.removeprefix(old): value for key, value in state.items() for old, new in prefixes.items() if key.startswith(old)}
