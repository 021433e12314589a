"""Convolutions of a network that only infers on a CPU: oneDNN's own weight layout is kept, and the activation runs inside the kernel.

torch reorders a convolution's weights at every call, and its activation reads and writes the whole map once more. Both are avoided by the
operators that ``torch.compile`` uses for frozen networks, without a compiler: nothing is traced, and any input size can follow any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.conv import FusedConv
from models.layers.reparam import FusedRepConv

INSIDE: dict[type[nn.Module], tuple[str, Callable[[Tensor], Tensor]]] = {  # activations that the kernel knows, and the same as functions
    nn.Identity: ("none", nn.Identity()),
    nn.SiLU: ("swish", F.silu),
    nn.ReLU: ("relu", F.relu),
}


class PackedConv(nn.Conv2d):
    """A convolution with its activation; parameters, shapes and results (to rounding) are those of the two modules that it replaces.

    Where the kernel cannot be used (a gradient is wanted, autocast, half precision, a GPU, tracing) both run as they are.
    """

    inside: str  # name of the activation in the kernel
    activate: Callable[[Tensor], Tensor]  # the same as a function
    _packed: tuple[Any, Tensor, tuple[Any, ...]] | None = None  # for what and which weights, the kernel's arguments; of the last size only

    @classmethod
    def of(cls, conv: nn.Conv2d, activation: nn.Module) -> PackedConv:
        """Shares the parameters of a convolution that pads with zeros; ``activation`` is one of :data:`INSIDE`."""
        packed = cls.__new__(cls)
        packed.__dict__.update(conv.__dict__)
        packed.__dict__.update(zip(("inside", "activate"), INSIDE[type(activation)]))
        return packed

    def forward(self, x: Tensor) -> Tensor:
        arguments = self._kernel_arguments(x)
        if arguments is None:
            return self.activate(super().forward(x))
        return torch.ops.mkldnn._convolution_pointwise(x, *arguments)

    def _kernel_arguments(self, x: Tensor) -> tuple[Any, ...] | None:
        """The kernel's arguments after the map, with the weights in the layout that suits maps of this shape; None where it cannot be used.

        They are made anew when shape or weights have changed. What is asked at each call is little: small maps cost as much to call as to
        compute, and an attribute of a module takes longer than its dictionary.
        """
        if torch.is_grad_enabled() or not x.is_cpu or torch.is_autocast_enabled("cpu"):
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if weight is None or weight.is_inference():  # re-parameterised by a user, or without a count of versions
            return None
        sizes = (self.padding, self.stride, self.dilation, self.groups)
        key = (x.shape, x.dtype, weight.data_ptr(), weight._version, sizes)
        packed = self._packed
        if packed is None or packed[0] != key or packed[1] is not weight or packed[2][1] is not bias:
            if x.dtype != torch.float32 or weight.dtype != torch.float32 or not weight.is_cpu or x.dim() != 4 or x.numel() == 0:
                return None
            in_layout = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *sizes, list(x.shape))
            packed = key, weight, (in_layout, bias, *sizes, self.inside, [], "")
            self._packed = packed  # one assignment: threads may share the module
        return packed[2]

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed weights, which can be neither saved nor moved."""
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


class PackedUnit(nn.Module):
    """A convolution and its activation as one call; parameters keep the names that they have in the module that it replaces."""

    convolution: str  # its name

    @classmethod
    def of(cls, unit: nn.Module, name: str, convolution: PackedConv) -> PackedUnit:
        """Shares everything of a unit but its convolution, called ``name``, and its activation, which the packed one has taken over."""
        packed = cls.__new__(cls)
        packed.__dict__.update(unit.__dict__, convolution=name, _modules={name: convolution})
        return packed

    def forward(self, x: Tensor) -> Tensor:
        return self._modules[self.convolution](x)  # type: ignore[misc]  # faster than the attribute


def pack_convolutions(model: nn.Module) -> None:
    """Replaces the convolutions of a fused network, in place, where this torch has the kernels; nothing else changes elsewhere."""
    if can_pack():
        _pack_children(model)


@lru_cache(maxsize=1)
def can_pack() -> bool:
    """Whether this torch has the operators, and they give what a convolution gives: they are no public interface."""
    conv = nn.Conv2d(8, 8, 3, padding=1)
    x = torch.linspace(-1, 1, 8 * 36).view(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = F.silu(conv(x))
        try:
            return torch.backends.mkldnn.is_available() and torch.allclose(PackedConv.of(conv, nn.SiLU())(x), expected, atol=1e-5)
        except (AttributeError, RuntimeError, TypeError):  # absent, without a kernel for this processor, or with other arguments
            return False


def _pack_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, (FusedConv, FusedRepConv)):
            setattr(module, name, _packed_unit(child, "conv" if isinstance(child, FusedConv) else "rbr_reparam"))
        elif _can_replace(child):
            setattr(module, name, PackedConv.of(child, nn.Identity()))  # type: ignore[arg-type]
        else:
            _pack_children(child)


def _packed_unit(unit: nn.Module, name: str) -> nn.Module:
    """The unit with its convolution packed, where that can be."""
    conv, act = getattr(unit, name), unit.get_submodule("act")
    if not _can_replace(conv):
        return unit
    if type(act) in INSIDE:
        return PackedUnit.of(unit, name, PackedConv.of(conv, act))
    setattr(unit, name, PackedConv.of(conv, nn.Identity()))
    return unit


def _can_replace(module: nn.Module) -> bool:
    """A plain convolution that no hook watches, with numbers for padding and values to pack."""
    if type(module) is not nn.Conv2d:
        return False
    watched: Sequence[Any] = (module._forward_hooks, module._forward_pre_hooks, module._parameters.keys() - {"weight", "bias"})
    return module.padding_mode == "zeros" and not isinstance(module.padding, str) and not any(watched)
