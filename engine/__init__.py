"""What the scripts run: training, evaluation, inference and the doctor. Imports: scripts -> engine -> {models, data} -> tasks -> utils.

``from engine import load_model`` gives a model that takes images of any kind: ``results = load_model("best.pt")("a.jpg")``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.inference.image_model import ImageModel, load_model
    from engine.inference.results import Results

__all__ = ["ImageModel", "Results", "load_model"]
_HOMES = {"ImageModel": "engine.inference.image_model", "load_model": "engine.inference.image_model", "Results": "engine.inference.results"}


def __getattr__(name: str) -> Any:
    """Imports the parts on first use, so that ``import engine`` stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
