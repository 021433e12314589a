"""What a network looks at: ``explain(model, image)`` for one image, ``explain.py`` for folders, pages and comparisons."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.explain.explaining import ExplainOptions, Explanation, explain

__all__ = ["ExplainOptions", "Explanation", "explain"]


def __getattr__(name: str) -> Any:
    """Imports the parts on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'engine.explain' has no attribute {name!r}")
    return getattr(importlib.import_module("engine.explain.explaining"), name)
