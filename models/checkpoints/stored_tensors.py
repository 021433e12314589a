"""From what a file describes to tensors: bounded by what the file holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from models.checkpoints.safe_pickle import Global, Record
from models.checkpoints.torch_files import StoredTensor
from utils.errors import UserError
from utils.reading.limits import MIB, REPEATED_STORAGE


def materialised(content: Any, *, device: torch.device | str = "cpu") -> Any:
    """Content as ``read_torch_file`` gives it, with its tensors read; for files that hold plain containers, values and tensors only.

    Raises:
        UserError: an object of a class, a tensor that is larger than its storage, or tensors that are far more than what is stored.
    """
    stored = list(_stored_in(content))
    check_total(stored)
    tensors = {id(tensor): tensor.load().to(device) for tensor in stored}

    def convert(value: Any) -> Any:
        match value:
            case StoredTensor():
                return tensors[id(value)]
            case Record() | Global():
                raise UserError(f"holds {value.cls if isinstance(value, Record) else value}; plain values and tensors are expected")
            case dict():
                return {key: convert(entry) for key, entry in value.items()}
            case list() | tuple():
                return type(value)(convert(entry) for entry in value)
        return value

    return convert(content)


def check_total(tensors: Sequence[StoredTensor]) -> None:
    """Refuses tensors that would take far more memory than their storages. Raises UserError."""
    storages = {id(tensor.storage): tensor.storage for tensor in tensors}
    held = sum(storage.count * storage.dtype.itemsize for storage in storages.values())
    needed = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in tensors)
    if needed > REPEATED_STORAGE * held + MIB:
        raise UserError(f"its tensors would be {needed // MIB} MiB, made of {held // MIB} MiB in the file")


def _stored_in(content: Any) -> Iterator[StoredTensor]:
    """The different tensors within plain containers."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, StoredTensor):
            yield value
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
