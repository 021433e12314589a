"""The memory format of a network's weights: channels last, like the images of ``utils.types.to_unit_range``, or packed for a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from models.layers.packed import pack_convolutions

if TYPE_CHECKING:
    from models.model import Model


def channels_last(model: Model) -> Model:
    """Converts tensors with four dimensions to channels last, in place (``Module.to`` refuses a position table with five dimensions)."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


def ready_to_infer(model: Model, device: torch.device) -> Model:
    """A deployed network on its device, in the memory format that is fastest there; the model itself is changed."""
    model = channels_last(model).to(device)
    if device.type == "cpu":
        pack_convolutions(model)
    return model
