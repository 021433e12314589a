"""``from models.registry import register``: what blocks of one's own (``--plugins``) import; the registry is models/spec/registry.py."""

from __future__ import annotations

from models.spec.registry import BLOCKS, load_plugin, register

__all__ = ["BLOCKS", "load_plugin", "register"]
