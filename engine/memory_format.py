"""The memory format of a network's weights: channels last, like the images of ``utils.types.to_unit_range``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from models.model import Model


def channels_last(model: Model) -> Model:
    """Converts tensors with four dimensions to channels last, in place (``Module.to`` refuses a position table with five dimensions)."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model
