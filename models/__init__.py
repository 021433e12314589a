"""Networks: ``build_model("yolov9-c.yaml", nc=80)`` makes one, ``load_model("best.pt")`` reads one, and two functions list what is there.

What is read here takes tensors; for files, arrays and folders there is ``engine.load_model``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.build import build_model
    from models.checkpoints.checkpoint import load_model
    from models.listing import list_blocks, list_models
    from models.model import Model

__all__ = ["Model", "build_model", "list_blocks", "list_models", "load_model"]
_RENAMED = {"Detector": "Model"}  # users' scripts import the class under its former name
_HOMES = {
    "Model": "models.model", "Detector": "models.model", "build_model": "models.build", "load_model": "models.checkpoints.checkpoint",
    "list_blocks": "models.listing", "list_models": "models.listing",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports the parts on first use, so that ``import models`` (and ``train.py --help``) stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), _RENAMED.get(name, name))
