"""How YAML rows write a segmentation head: ``[nc, masks, hidden]``, or ``[nc, anchors, masks, hidden]`` with anchors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from models.spec import channel_rules as rules
from models.spec.channel_rules import LayerPlan, RuleContext
from utils.errors import UserError

ORDER = "nc, then anchors where the head has them, the number of prototypes (32) and the width of the convolutions before them (256)"


def segment_row(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """The row of a head that predicts masks; the width of the prototypes' convolutions is scaled like any other."""
    nc, *rest = args or [context.nc]
    anchored = bool(rest) and (isinstance(rest[0], (list, tuple)) or len(rest) > 2)
    anchors, rest = (rest[:1], rest[1:]) if anchored else ([], rest)
    if len(rest) > 2 or not all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in rest):
        raise UserError(f"expects {ORDER}, got {list(args)}")
    plan = rules.head([nc, *anchors], context)
    options = dict(zip(("masks", "hidden"), (rest[0], *map(context.width, rest[1:])))) if rest else {"hidden": context.width(256)}
    return replace(plan, kwargs={**plan.kwargs, **options})
