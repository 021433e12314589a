"""``--checkpoint-activations``: modules store only their input, and are recomputed in the backward pass.

Training is bit for bit what it is without: a recomputed module draws the same random numbers, in the same precision, and updates running
statistics in copies that are discarded. Parameters keep their names, as only the ``forward`` of a module is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.training.learning_rates import is_attention
from models.model import Model
from models.spec.registry import BLOCKS
from utils.errors import UserError


def recomputed_parts(model: Model, scope: str) -> list[nn.Module]:
    """The modules that are recomputed: for ``attention`` every outermost attention module, wherever it is in the network; for ``all`` also
    every row with parameters except the head. Attention inside such a row is checkpointed again, which lowers the row's own peak.

    Raises:
        UserError: there are none.
    """
    if scope == "off":
        return []
    found = [spec for spec in BLOCKS.values() if is_attention(spec) and spec.kind != "block"]  # not RepVGGDW, a convolution within CIB
    kinds = tuple(spec.cls for spec in found if isinstance(spec.cls, type))
    rows = list(model.model)[:-1]
    parts = [part for row in rows for part in _outermost(row, kinds)]
    if scope == "all":
        parts += [row for row in rows if row not in parts and next(row.parameters(), None) is not None]
    if not parts:
        raise UserError(f"--checkpoint-activations {scope}: {model.spec.origin} has no attention; give --checkpoint-activations all")
    return parts


def checkpoint_activations(model: Model, scope: str) -> str:
    """Replaces the ``forward`` of the modules, in place; returns a line that describes it."""
    parts = recomputed_parts(model, scope)
    for part in parts:
        part.forward = MethodType(forward, part)  # type: ignore[method-assign]
    return f"activations of {len(parts)} modules are computed again in the backward pass"


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The checkpointed form of the ``forward`` of a module's class. It is bound to the instance, so that deepcopy binds it to the copy, and
    has this name because a pickled bound method is looked up by name: unpickled, it is the plain one.
    """
    plain = type(self).forward
    if not torch.is_grad_enabled() or torch.jit.is_tracing():
        return plain(self, *args, **kwargs)
    if torch.compiler.is_compiling():  # a compiler handles side effects itself, and supports no context_fn
        return checkpoint(plain, self, *args, use_reentrant=False, **kwargs)
    return checkpoint(plain, self, *args, use_reentrant=False, context_fn=partial(_contexts, self), **kwargs)


class FirstBuffers:
    """While a module is recomputed its buffers are copies of their values at the first run, and the copies get the updates."""

    def __init__(self, part: nn.Module) -> None:
        places = [(m._buffers, name) for m in part.modules() for name, value in m._buffers.items() if value is not None]
        self.copies = [(buffers, name, buffers[name].clone()) for buffers, name in places]  # type: ignore[union-attr]
        self.present: list[torch.Tensor | None] = []

    def __enter__(self) -> None:
        self.present = [buffers[name] for buffers, name, _ in self.copies]
        for buffers, name, value in self.copies:
            buffers[name] = value

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for (buffers, name, _), value in zip(self.copies, self.present):
            buffers[name] = value


def _contexts(part: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), FirstBuffers(part)


def _outermost(module: nn.Module, kinds: tuple[type, ...]) -> Iterator[nn.Module]:
    if isinstance(module, kinds):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, kinds)
