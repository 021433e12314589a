"""``from models import channel_rules as rules``: what users' blocks import; the rules are in models/spec/channel_rules.py."""

from __future__ import annotations

from models.spec.channel_rules import (
    ChannelRule,
    LayerPlan,
    RuleContext,
    __getattr__,
    add,
    concat,
    head,
    keep_width,
    make_divisible,
    out_width,
    out_width_repeated,
    rearrange,
    same_width,
    select_and_add,
    split_maps,
)

__all__ = [
    "ChannelRule",
    "LayerPlan",
    "RuleContext",
    "__getattr__",
    "add",
    "concat",
    "head",
    "keep_width",
    "make_divisible",
    "out_width",
    "out_width_repeated",
    "rearrange",
    "same_width",
    "select_and_add",
    "split_maps",
]
