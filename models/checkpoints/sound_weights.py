"""Weights that no network can compute with: NaN, infinity, or integers where a layer has floating-point numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError

FLOATING = ("weight", "bias", "running_mean", "running_var", "gamma")  # last parts of names that are never integers


def check_weights(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuses weights with a value that is not finite, or not of a floating-point type.

    Args:
        weights: tensors by name.
        source: their file, for the message.

    Raises:
        UserError: names the first such tensor, and how many there are.
    """
    faults = {name: fault for name, value in weights.items() if (fault := fault_of(name, value))}
    if faults:
        name, fault = next(iter(faults.items()))
        more = f" (and {len(faults) - 1} more tensors)" if len(faults) > 1 else ""
        raise UserError(f"{source}: {name} {fault}{more}; expected: finite floating-point weights")


def fault_of(name: str, value: Tensor) -> str:
    """What is wrong with a tensor; empty for a sound one. Integer buffers, such as indices and counters, are sound."""
    if not value.is_floating_point():
        return f"is of type {str(value.dtype).removeprefix('torch.')}" if name.rpartition(".")[2] in FLOATING else ""
    if value.dtype.itemsize == 1:  # float8, which knows no arithmetic
        value = value.float()
    finite = torch.isfinite(value)
    if finite.all():
        return ""
    wrong = int(value.numel() - finite.sum())
    kind = "NaN" if torch.isnan(value).any() else "infinity"
    return f"holds {kind} ({wrong} of {value.numel()} values are not finite)"
