"""Which published network bare weights belong to: by the names and shapes of all their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from models.parser import CONFIGS, load_spec, plan_layers
from utils.errors import UserError

FAMILIES = ("v5", "v7", "v8", "v9")
Shapes = Mapping[str, tuple[int, ...]]


def recognised(path: Path, shapes: Shapes) -> tuple[dict[str, Any], str]:
    """The YAML (as a mapping) whose network has exactly these tensors, and its file name; nothing where there is none.

    The config that is called like the file is tried first, then all published ones.
    """
    last = _last_row(shapes)
    nc = _classes(shapes, last)
    if nc is None:
        return {}, ""
    for name in dict.fromkeys((f"{path.stem}.yaml", *published_names())):
        try:
            spec = load_spec(name, nc=nc)
            plans = plan_layers(spec)
        except UserError:
            continue
        if len(plans) == last + 1 and _fits(name, nc, shapes):
            return spec.to_dict(), spec.origin if spec.dialect == "v5" else name
    return {}, ""


@cache
def published_names() -> tuple[str, ...]:
    """Names under which the published networks are built, one a scale."""
    return tuple(_names())


def _names() -> Iterator[str]:
    for path in sorted(p for family in FAMILIES for p in (CONFIGS / family).glob("*.yaml")):
        scales = yaml.safe_load(path.read_text(encoding="utf-8")).get("scales") or {}
        if len(scales) < 2:
            yield path.name
        else:
            head, digit, rest = path.stem.partition("8")
            yield from (f"{head}{digit}{scale}{rest}.yaml" for scale in scales)


def _fits(name: str, nc: int, shapes: Shapes) -> bool:
    """Whether the network of this name has these tensors, each of this shape; built without memory."""
    from models.detector import build_model

    try:
        with torch.device("meta"):
            own = build_model(name, nc=nc).state_dict()
    except UserError:
        return False
    return {key: tuple(value.shape) for key, value in own.items()} == dict(shapes)


def _last_row(shapes: Shapes) -> int:
    rows = [int(part[1]) for part in (key.split(".") for key in shapes) if len(part) > 2 and part[0] == "model" and part[1].isdecimal()]
    return max(rows, default=-1)


def _classes(shapes: Shapes, last: int) -> int | None:
    """Number of classes, from the head's last convolutions."""
    head = f"model.{last}."
    free, anchored, anchors = (shapes.get(head + key) for key in ("cv3.0.2.weight", "m.0.weight", "anchors"))
    if free:
        return free[0]
    if anchored and anchors and anchors[1]:
        return anchored[0] // anchors[1] - 5
    return None
