"""``--checkpoint-activations``: parts of a network keep nothing but their input, and run once more in the backward pass.

Training is what it would be without, bit for bit: a part that runs again draws the same random numbers, in the same precision, and updates
running statistics in copies that are thrown away. Parameters keep their names, for a part gets another ``forward`` and nothing else.
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
    """The modules that would run again: of ``attention`` every outermost attention module, wherever it stands; of ``all`` every row with
    parameters but the head, and within a row its attention modules once more, as a row of many blocks would need much at once.

    Raises:
        UserError: there are none.
    """
    if scope == "off":
        return []
    kinds = tuple(spec.cls for spec in BLOCKS.values() if isinstance(spec.cls, type) and is_attention(spec))
    rows = list(model.model)[:-1]
    parts = [part for row in rows for part in _outermost(row, kinds)]
    if scope == "all":
        parts += [row for row in rows if row not in parts and next(row.parameters(), None) is not None]
    if not parts:
        raise UserError(f"--checkpoint-activations {scope}: {model.spec.origin} has no attention; give --checkpoint-activations all")
    return parts


def checkpoint_activations(model: Model, scope: str) -> str:
    """Lets the parts run again, changing the model in place; says in a line what was done."""
    parts = recomputed_parts(model, scope)
    for part in parts:
        part.forward = MethodType(forward, part)  # type: ignore[method-assign]
    return f"activations of {len(parts)} modules are computed again in the backward pass"


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands before the ``forward`` of a part's class. It is bound to the part, so that a copy of a part is bound to the copy, and has
    this name because a pickled part looks for it by name, and then finds the plain one.
    """
    plain = type(self).forward
    if not torch.is_grad_enabled() or torch.jit.is_tracing():
        return plain(self, *args, **kwargs)
    if torch.compiler.is_compiling():  # a compiler knows by itself what may run once only, and takes no contexts of ours
        return checkpoint(plain, self, *args, use_reentrant=False, **kwargs)
    return checkpoint(plain, self, *args, use_reentrant=False, context_fn=partial(_contexts, self), **kwargs)


class FirstBuffers:
    """While a part runs again its buffers are copies of what they were when it ran first, and the copies take its updates."""

    def __init__(self, part: nn.Module) -> None:
        places = [(m._buffers, name) for m in part.modules() for name, value in m._buffers.items() if value is not None]
        self.first = [(buffers, name, buffers[name].clone()) for buffers, name in places]  # type: ignore[union-attr]
        self.present: list[torch.Tensor | None] = []

    def __enter__(self) -> None:
        self.present = [buffers[name] for buffers, name, _ in self.first]
        for buffers, name, value in self.first:
            buffers[name] = value

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for (buffers, name, _), value in zip(self.first, self.present):
            buffers[name] = value


def _contexts(part: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), FirstBuffers(part)


def _outermost(module: nn.Module, kinds: tuple[type, ...]) -> Iterator[nn.Module]:
    if isinstance(module, kinds):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, kinds)
