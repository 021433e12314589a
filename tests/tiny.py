"""A network small enough for tests that build, save, export and run it in fractions of a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import build_model
from models.checkpoints.checkpoint import Checkpoint, save_checkpoint
from models.model import Model
from tests.golden import fill_

NAMES = ("red cell", "it's a star", "Größe/2")
HEAD = [[3, 4, 7], 1, "DDetect", ["nc"]]
DUAL_HEAD = [[3, 4, 6, 3, 4, 7], 1, "DualDDetect", ["nc"]]


def tiny_cfg(*, attention: Sequence[Any] = ("FocalModulation", []), head: Sequence[Any] = HEAD) -> dict[str, Any]:
    """A YOLOv9-like network of a tenth of a million parameters with strides 8, 16 and 32."""
    rows = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "RepNCSPELAN4", [16, 16, 8, 1]], [-1, 1, "ADown", [32]]]
    rows += [[-1, 1, "ADown", [32]], [-1, 1, "ADown", [32]], [-1, 1, "SPPELAN", [32, 16]], [-1, 1, *attention]]
    return {"nc": 80, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": 3, "backbone": rows, "head": [list(head)]}


def tiny_model(names: Sequence[str] = NAMES, **cfg: Any) -> Model:
    """Filled by the rule of the golden vectors, so that scores differ from cell to cell; in evaluation mode."""
    model = build_model(tiny_cfg(**cfg), names=names)
    fill_(model, 1.35)
    return model.eval()


def tiny_checkpoint(path: Path, names: Sequence[str] = NAMES, *, config: dict[str, Any] | None = None, **cfg: Any) -> Path:
    """The same as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = tiny_model(names, **cfg).state_dict()
    save_checkpoint(path, Checkpoint(cfg=tiny_cfg(**cfg), cfg_name="tiny.yaml", names=tuple(names), weights=weights, config=config or {}))
    return path
