"""The order of a network's weights in memory: channels last, as ``utils.types.to_unit_range`` lays the images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from models.model import Model


def channels_last(model: Model) -> Model:
    """The model, changed in place: what has four dimensions lies channels last (``Module.to`` refuses the five of a position table)."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model
