"""Bounds what the construction of a network allocates: a YAML of a few bytes can name a layer of any size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from utils.errors import UserError

SIZED = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
LENGTHS = (torch.arange, torch.linspace, torch.eye)


class AllocationLimit(TorchFunctionMode):
    """Within this context no more than ``values`` are made by torch's factory functions, all together.

    Raises:
        UserError: before the one that would exceed it is made.
    """

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values, self._made = values, 0

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self._made += _requested(func, args, kwargs or {})
        if self._made > self.values:
            raise UserError(f"needs more than {self.values} parameters and buffers up to here")
        return func(*args, **(kwargs or {}))


def _requested(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Values that a call of a factory function makes; 0 for any other function."""
    if func in SIZED:
        given = kwargs.get("size", args[0] if args and isinstance(args[0], (list, tuple)) else args)
        return math.prod(int(n) for n in given if isinstance(n, int)) if isinstance(given, (list, tuple)) else 0
    if func in LENGTHS:
        return int(max((abs(a) for a in args if isinstance(a, (int, float)) and math.isfinite(a)), default=0))
    return 0
