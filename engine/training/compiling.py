"""``--compile``: torch.compile where this machine supports it, else a warning with the reason, and training without it."""

from __future__ import annotations

import sys
from types import MethodType

import torch
from torch import Tensor, nn

from engine.training import recompute
from models.heads.base import Loss
from utils import distributed

BACKEND = "inductor"
MOST_GRAPHS = 32  # of one function: a loss has one for each bucket of boxes, and again for a smaller last batch


def compile_network(network: nn.Module, device: torch.device, *, sizes_vary: bool, recomputed: bool = False) -> bool:
    """Compiles the module that is called in training, in place; returns whether this machine can.

    Args:
        sizes_vary: batches have many shapes, so that one dynamic graph is compiled at once.
        recomputed: modules in it are recomputed in the backward pass.
    """
    if reason := unsupported_reason(device, recomputed=recomputed):
        if distributed.is_main():
            print(f"warning: --compile: {reason}; training continues without it", file=sys.stderr)
        return False
    network.compile(backend=BACKEND, dynamic=True if sizes_vary else None)
    return True


def compile_loss(loss: Loss, device: torch.device, *, sizes_vary: bool) -> None:
    """Compiles the loss where that pays, in place; else says why it does not, and the loss is computed without.

    Args:
        sizes_vary: batches have many shapes.
    """
    if device.type == "cpu":
        reason = "on a CPU it lists candidates, which is faster than the fixed sizes of a graph"
    elif sizes_vary:
        reason = "every size of --multi-scale and --rect would be a graph of its own"
    else:
        reason = loss.compile(backend=BACKEND)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    if reason and distributed.is_main():
        print(f"compile   the network; not the loss: {reason}")


def unsupported_reason(device: torch.device, *, recomputed: bool = False) -> str:
    """Why this machine cannot compile, found by compiling a small function; empty where it can."""
    try:
        torch.compile(_small_function, backend=BACKEND)(torch.ones(8, device=device))
        if recomputed and not _counts_once(device):
            return f"torch {torch.__version__} counts a batch twice in running statistics where --checkpoint-activations computes it again"
    except Exception as error:  # a missing compiler, an unsupported Python or GPU: each raises a type of its own
        return _first_line(error)
    return ""


def _small_function(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) + x


def _counts_once(device: torch.device) -> bool:
    """Whether a compiled batch norm that is recomputed in the backward pass updates its statistics once, as a plain one does."""
    x = torch.arange(8.0, device=device).view(2, 1, 2, 2).requires_grad_()
    norms = [nn.BatchNorm2d(1, device=device) for _ in range(2)]
    norms[1].forward = MethodType(recompute.forward, norms[1])  # type: ignore[method-assign]
    norms[1].compile(backend=BACKEND)
    for norm in norms:
        norm(x).sum().backward()
    return torch.allclose(norms[0].running_mean, norms[1].running_mean)  # type: ignore[arg-type]


def _first_line(error: BaseException) -> str:
    """The first line of a compiler's error message, without the stack that follows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text[:200].rstrip(".:;")
