"""A network's rows for people: as a table with shapes and readers, and as a YAML file that builds the same network again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from models.model import Model
from models.spec.channel_rules import LayerPlan
from models.spec.parser import ModelSpec
from utils.errors import UserError
from utils.text_table import text_table

COLUMNS = ("row", "from", "module", "args", "output", "parameters", "readers")
RIGHT = (COLUMNS.index("row"), COLUMNS.index("parameters"))


def graph_table(model: Model, *, imgsz: int = 640) -> str:
    """Row, from, module, args as written, output (C x H x W) for an image of ``imgsz`` px, parameters, and which rows read it."""
    shapes = _shapes(model, imgsz)
    lines = [COLUMNS]
    for plan, row, layer in zip(model.plans, model.spec.rows, model.model):
        readers = [str(p.index) for p in model.plans if plan.index in p.sources]
        repeats = f"{plan.repeats} x " if plan.repeats > 1 else ""
        parameters = sum(p.numel() for p in layer.parameters())
        written = (str(plan.index), _flow(row.source), repeats + row.module, _flow(list(row.args)))
        lines.append((*written, shapes[plan.index], f"{parameters:,}", " ".join(readers)))
    total = sum(p.numel() for p in model.parameters())
    lines.append(("", "", "total", "", "", f"{total:,}", ""))
    return text_table(lines, right=RIGHT)


def spec_yaml(spec: ModelSpec, *, notes: Sequence[str] = ()) -> str:
    """The text of a YAML file in the spec's dialect that builds the same network; ``notes`` become comments at the top."""
    content = {"yaml_file": _family(spec.origin), **spec.to_dict()}
    lines = [f"# {note}" for note in notes]
    number = 0
    for key, value in content.items():
        if key not in ("backbone", "head"):
            lines += [f"{key}: {_flow(value)}"] if not isinstance(value, dict) else _table(key, value)
            continue
        lines += ["", f"{key}:  # [from, number, module, args]"] if value else ["", f"{key}: []"]
        rows = [_flow(row) for row in value]
        widest = max(map(len, rows), default=0)
        for row in rows:
            lines.append(f"  - {row:<{widest}}  # {number:>3}")
            number += 1
    return "\n".join(lines) + "\n"


def write_spec(path: str | Path, spec: ModelSpec, *, notes: Sequence[str] = ()) -> None:
    """Writes :func:`spec_yaml` to a file. Raises UserError where it cannot be written."""
    try:
        Path(path).write_text(spec_yaml(spec, notes=notes), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


@torch.no_grad()
def _shapes(model: Model, imgsz: int) -> list[str]:
    """Of every row's output, as text."""
    found: list[str] = []

    def call(plan: LayerPlan, layer: nn.Module, inputs: Any) -> Any:
        out = layer(inputs)
        maps = [out] if isinstance(out, Tensor) else list(out.main) if plan.out_channels == 0 else list(out)
        found.append(" ".join("x".join(map(str, m.shape[1:])) for m in maps))
        return out

    was_training = model.training
    model.eval()
    model.run_rows(torch.zeros(1, model.ch, imgsz, imgsz), call)
    model.train(was_training)
    return found


def _table(key: str, value: dict[str, Any]) -> list[str]:
    return [f"{key}:", *(f"  {_flow(name)}: {_flow(entry)}" for name, entry in value.items())]


def _flow(value: Any) -> str:
    """One line of YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _family(origin: str) -> str:
    """The file at the beginning of a chain of edited files: ``yolov7.yaml`` of ``model.yaml (yolov7.yaml)``."""
    match = re.fullmatch(r".* \((.+)\)", origin)
    return match[1] if match else origin
