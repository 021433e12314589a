"""YOLOv5's first release (1.0) in the form of the later ones: its YAML is ``model.md``, and the head's convolutions are rows of their own.

There each level ends in a row ``nn.Conv2d, [na * (nc + 5), 1, 1]``, and ``Detect``, which reads nothing by its row (``[]``), finds them by
their width. Here they become the head's ``m``, their rows go, and what follows moves up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from models.checkpoints.foreign_modules import children, rows_of
from models.checkpoints.safe_pickle import Global, Record
from utils.errors import UserError

MODULE_LIST = Global("torch.nn.modules.container", "ModuleList")


def as_later_release(model: Record) -> Record:
    """A network of release 1.0 as later releases would hold it; any other is returned as it is.

    Raises:
        UserError: the rows of the file cannot be followed.
    """
    written = model.state.get("md")
    if "yaml" in model.state or not isinstance(written, dict):
        return model
    rows = rows_of(model)
    listed = [list(row) for section in ("backbone", "head") for row in _rows(written.get(section))]
    if len(listed) != len(rows):
        raise UserError(f"its YAML has {len(listed)} rows, the network {len(rows)}")
    outputs = _head_convolutions(rows)
    if not outputs:
        return _changed(model, {"yaml": written})
    sources = [_absolute(row[0], index) for index, row in enumerate(listed)]
    kept = [index for index in range(len(rows)) if index not in outputs]
    number = {old: new for new, old in enumerate(kept)} | {-1: -1}
    sources[-1] = [sources[index][0] for index in outputs]
    try:
        moved = [[[number[s] for s in sources[old]], *listed[old][1:]] for old in kept]
    except KeyError:
        raise UserError("its YAML has a row that reads an output convolution; YOLOv5 1.0 has none such") from None
    for row in moved[:-1]:
        row[0] = row[0][0] if len(row[0]) == 1 else row[0]
    head = _changed(rows[-1], {}, {"m": _container(MODULE_LIST, [rows[index] for index in outputs])})
    layers = _container(children(model)["model"].cls, [*(rows[index] for index in kept[:-1]), head])
    split = sum(index < len(_rows(written.get("backbone"))) for index in kept)
    return _changed(model, {"yaml": {**written, "backbone": moved[:split], "head": moved[split:]}}, {"model": layers})


def _head_convolutions(rows: Sequence[Record]) -> list[int]:
    """The rows that the head reads, where each is a bare convolution; none where the head has convolutions itself."""
    head = rows[-1]
    read = head.state.get("f")
    if "m" in children(head) or not isinstance(read, (list, tuple)) or not all(isinstance(index, int) for index in read):
        return []
    last = len(rows) - 1
    found = [index if index >= 0 else last + index for index in read]
    return found if all(0 <= index < last and rows[index].cls.name == "Conv2d" for index in found) else []


def _rows(section: Any) -> list[Any]:
    return [row for row in section if isinstance(row, (list, tuple)) and len(row) == 4] if isinstance(section, list) else []


def _absolute(source: Any, index: int) -> list[int]:
    given = source if isinstance(source, (list, tuple)) else [source]
    if not all((isinstance(s, int) and -index <= s < index) or (s == -1 and index == 0) for s in given):
        raise UserError(f"its YAML has a row that reads {str(source)[:40]}")
    return [s if s >= 0 or index == 0 else index + s for s in given]


def _container(cls: Global, modules: Sequence[Record]) -> Record:
    made = Record(cls)
    made.state = {"_modules": {str(index): module for index, module in enumerate(modules)}}
    return made


def _changed(module: Record, state: Mapping[str, Any], modules: Mapping[str, Record] | None = None) -> Record:
    """A copy of a record with other attributes and children; the record stays as it is."""
    made = Record(module.cls, module.args)
    made.state = {**module.state, **state, "_modules": {**children(module), **(modules or {})}}
    return made
