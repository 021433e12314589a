"""Networks: ``build_model("yolov9-c.yaml", nc=80)`` makes one, ``load_model("best.pt")`` reads one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.checkpoints.checkpoint import load_model
    from models.model import Model, build_model

__all__ = ["Model", "build_model", "load_model"]
_HOMES = {"Model": "models.model", "build_model": "models.model", "load_model": "models.checkpoints.checkpoint"}


def __getattr__(name: str) -> Any:
    """Imports the parts on first use, so that ``import models`` (and ``train.py --help``) stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
