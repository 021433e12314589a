"""The memory format of a network's weights: channels last, like the images of ``utils.types.to_unit_range``, or packed for a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from models.layers.packed import pack_convolutions

if TYPE_CHECKING:
    from models.model import Model


def channels_last(model: Model) -> Model:
    """Converts tensors with four dimensions to channels last, in place (``Module.to`` refuses a position table with five dimensions)."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


def prefer_onednn(network: nn.Module) -> None:
    """Lets oneDNN run the 1×1 convolutions of a network that one thread trains with AVX-512, in place.

    Below 16 images torch gives them to a plain matrix product there, which is slower (a step of gelan-c takes 1.26 times as long), and to
    oneDNN where they are dilated, which means nothing for a kernel of one pixel. With several threads they are oneDNN's anyway.
    """
    if torch.get_num_threads() > 1 or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return
    for module in network.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (1, 1) and not isinstance(module.padding, str):
            module.dilation = (2, 2)


def ready_to_infer(model: Model, device: torch.device) -> Model:
    """A deployed network on its device, in the memory format that is fastest there; the model itself is changed."""
    model = channels_last(model).to(device)
    if device.type == "cpu":
        pack_convolutions(model)
    return model
