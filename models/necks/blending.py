"""What the necks share: the channel rule of a layer that blends maps of one width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.spec.channel_rules import LayerPlan, RuleContext
from utils.errors import UserError


def blends(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """Several inputs of one width and size in, one map of that width out; built as ``cls(channels, *args, inputs=number of inputs)``."""
    widths = context.plain
    if len(set(widths)) != 1 or len(widths) < 2:
        raise UserError(f"blends two or more inputs of one width, not widths {list(widths)}")
    return LayerPlan((widths[0], *args), widths[0], kwargs={"inputs": len(widths)}, takes_list=True)
