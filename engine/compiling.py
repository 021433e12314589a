"""``--compile``: torch.compile where this machine can, else a line that says why not, and training goes on without."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from utils import distributed

BACKEND = "inductor"


def compile_network(network: nn.Module, device: torch.device, *, sizes_vary: bool) -> None:
    """Compiles what is called in training, in place.

    Args:
        sizes_vary: batches come in many shapes, so that one graph for all of them is wanted at once.
    """
    if reason := why_not(device):
        if distributed.is_main():
            print(f"warning: --compile: {reason}; training goes on without it", file=sys.stderr)
        return
    network.compile(backend=BACKEND, dynamic=True if sizes_vary else None)


def why_not(device: torch.device) -> str:
    """What keeps this machine from compiling, found by compiling a little; empty where nothing does."""
    try:
        torch.compile(_little, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, a Python or a GPU that is not supported: each has a type of its own
        return _first_line(error)
    return ""


def _little(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) + x


def _first_line(error: BaseException) -> str:
    """The first line of a compiler's complaint, without the stack that follows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text[:200].rstrip(".:;")
