"""Which published network bare weights belong to: by the names and shapes of all their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from models.model import Model
from models.spec.channel_rules import LayerPlan
from models.spec.config_files import CONFIGS, find_config
from models.spec.parser import ModelSpec, load_spec
from models.spec.planning import plan_layers
from utils.errors import UserError

FAMILIES = ("v5", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v26", "rtdetr")
SCALED = re.compile(r"(yolov5(?=-cls)|yolov8|yolo11|yolo12|yolov13|yolo26)(?![a-z\d])")  # of several scales, whose letter follows
SCALES = "nsmlx"
FEWER_SCALES = {"yolov13": "nslx"}
ONE_PER_CLASS = ("cv3.0.2.weight", "linear.weight", "enc_score_head.weight")  # tensors of heads whose first size is nc
Shapes = Mapping[str, tuple[int, ...]]


def recognised(path: Path, shapes: Shapes) -> tuple[dict[str, Any], str]:
    """The YAML (as a mapping) whose network has exactly these tensors, and its name; nothing where there is none, or where several
    that compute different things have them and the file is not called like one.
    """
    last = _last_row(shapes)
    nc = _classes(shapes, last)
    if nc is None:
        return {}, ""
    own = f"{path.stem}.yaml"
    if _is_bundled(own) and (spec := _fitting(own, nc, shapes, last)):
        return spec.to_dict(), own
    fits = {name: spec for name in published_names() if (spec := _fitting(name, nc, shapes, last))}
    different = list({str(spec.to_dict()): name for name, spec in reversed(fits.items())}.values())[::-1]
    if len(different) > 1:
        print(f"{path}: its tensors fit {' as well as '.join(different)}; give --cfg, or call the file like the one it is")
    return (fits[different[0]].to_dict(), different[0]) if len(different) == 1 else ({}, "")


@cache
def published_names() -> tuple[str, ...]:
    """Names under which the published networks are built, one a scale."""
    stems = sorted(p.stem for family in FAMILIES for p in (CONFIGS / family).glob("*.yaml"))
    found = {stem: SCALED.match(stem) for stem in stems}
    scaled = [f"{f[1]}{letter}{stem[f.end() :]}" for stem, f in found.items() if f for letter in FEWER_SCALES.get(f[1], SCALES)]
    return tuple(f"{stem}.yaml" for stem in [*(stem for stem, f in found.items() if not f), *scaled])


def _fitting(name: str, nc: int, shapes: Shapes, last: int) -> ModelSpec | None:
    """The spec of this name if its network has these tensors, each of this shape; it is built without memory."""
    spec = _spec(name)
    if len(spec.rows) != last + 1:
        return None
    spec = replace(spec, nc=nc)
    try:
        if not _widths_fit(plan_layers(spec), shapes):
            return None
        with torch.device("meta"):
            own = Model(spec).state_dict()
    except UserError:
        return None
    return spec if {key: tuple(value.shape) for key, value in own.items()} == dict(shapes) else None


def _widths_fit(plans: Sequence[LayerPlan], shapes: Shapes) -> bool:
    """A first look that builds nothing: the output widths of rows that are one convolution."""
    found = ((shapes.get(f"model.{plan.index}.conv.weight"), plan) for plan in plans)
    return all(plan.name != "Conv" or (shape is not None and shape[0] == plan.out_channels) for shape, plan in found)


@cache
def _spec(name: str) -> ModelSpec:
    return load_spec(name)


def _is_bundled(name: str) -> bool:
    try:
        return CONFIGS in find_config(Path(name).name)[0].parents
    except UserError:
        return False


def _last_row(shapes: Shapes) -> int:
    rows = [int(part[1]) for part in (key.split(".") for key in shapes) if len(part) > 2 and part[0] == "model" and part[1].isdecimal()]
    return max(rows, default=-1)


def _classes(shapes: Shapes, last: int) -> int | None:
    """Number of classes, from the head's last convolutions, or the layer that scores RT-DETR's queries."""
    head = f"model.{last}."
    if scored := next((found for key in ONE_PER_CLASS if (found := shapes.get(head + key))), None):
        return scored[0]
    anchored, anchors = (shapes.get(head + key) for key in ("m.0.weight", "anchors"))
    if anchored and anchors and anchors[1]:
        masks = shapes.get(head + "proto.cv3.conv.weight", (0,))[0]
        return anchored[0] // anchors[1] - 5 - masks
    return None
