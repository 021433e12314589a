"""A GPU that is not there: tensors that say they are on ``cuda:0`` and compute on the CPU.

Code that forgets to say where a tensor belongs, that waits for the device, or that takes another branch there, is found without one. What
a real device would refuse (operands on two devices, ``numpy()``) is refused here. Kernels and mixed precision are the CPU's.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision  # noqa: F401 - its operations are named below
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[1]
PARTS = ("data", "engine", "models", "tests", "utils")
FOLDERS = {ROOT, *(p.parent for part in PARTS for p in (ROOT / part).rglob("*.py"))}  # a .venv may lie beside them
aten = torch.ops.aten
# Operations whose result's size, or the branch after it, is known only when the device has answered.
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.equal,
    aten.is_nonzero, aten.bincount,
}  # fmt: skip
# Those without a deterministic kernel on CUDA: torch.use_deterministic_algorithms, in its own list.
ADDS_IN_ANY_ORDER = {
    aten._adaptive_avg_pool2d_backward, aten._adaptive_avg_pool3d_backward, aten.adaptive_max_pool2d_backward, aten.avg_pool3d_backward,
    aten.fractional_max_pool2d_backward, aten.max_unpool2d, aten.upsample_linear1d_backward, aten.upsample_bilinear2d_backward,
    aten.upsample_bicubic2d_backward, aten.upsample_trilinear3d_backward, aten.reflection_pad1d_backward, aten.reflection_pad2d_backward,
    aten.nll_loss_forward, aten.nll_loss2d_forward, aten.put_, aten.histc, aten.grid_sampler_2d_backward, aten.scatter_reduce,
    aten.scatter_reduce_, aten.index_reduce_,
    torch.ops.torchvision._deform_conv2d_backward,
}  # fmt: skip
INDEXES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
MAY_MIX = {aten.copy_, aten._to_copy, aten.set_}


@dataclass
class Seen:
    """What happened on the device: lines of the project, with the operation."""

    waits: list[str] = field(default_factory=list)
    unordered: list[str] = field(default_factory=list)


class Away(Tensor):
    """A tensor of the pretended device."""

    held: Tensor
    seen = Seen()
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Away:
        out = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device="cpu"
        )
        out.held = held
        return out

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Away({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = Away(self.held.clone()).requires_grad_(self.requires_grad)
        copy._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a file as it comes back from there with ``map_location="cpu"``."""
        return self.held.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refuse_two_devices(func, args, kwargs)
        take_note(func, args, kwargs)
        out = func(*tree_map_only(Away, held_by, args), **tree_map_only(Away, held_by, kwargs))
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, Away, out))


def held_by(tensor: Away) -> Tensor:
    return tensor.held


def refuse_two_devices(func: Any, args: Any, kwargs: Any) -> None:
    """As CUDA does: numbers (tensors without dimensions) may come from the CPU, and so may indices."""
    packet = func.overloadpacket
    strangers = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, Away)]
    if packet in MAY_MIX or not strangers:
        return
    if packet in INDEXES and isinstance(args[0], Away):
        strangers = [t for t in args[2:3] if isinstance(t, Tensor) and not isinstance(t, Away)]
    if any(t.dim() or packet in (aten.cat, aten.stack) for t in strangers):
        raise RuntimeError(f"{func}: tensors on cuda:0 and on the CPU, of {[tuple(t.shape) for t in strangers]}")


def take_note(func: Any, args: Any, kwargs: Any) -> None:
    packet = func.overloadpacket
    by_mask = packet in INDEXES and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if by_mask and packet is not aten.index:
        by_mask = args[2].numel() != 1  # a number needs no count of places
    repeats = packet is aten.repeat_interleave and kwargs.get("output_size") is None
    if packet in WAITS or by_mask or repeats:
        Away.seen.waits.append(f"{packet} {caller()}")
    if packet in ADDS_IN_ANY_ORDER and not {"amax", "amin"}.intersection(a for a in args if isinstance(a, str)):
        Away.seen.unordered.append(f"{packet} {caller()}")


def is_torchs_own() -> bool:
    """Optimizers and clipping ask a tensor's C++ part, which says that this device is the CPU."""
    between = (__file__, "torch/autograd/function.py", "torch/overrides.py")
    asking = next(f.filename for f in reversed(traceback.extract_stack()) if not f.filename.endswith(between))
    return "/torch/optim/" in asking or asking.endswith("clip_grad.py")


def caller() -> str:
    """The line of the project that asks, with the line that called it."""
    own = [f for f in traceback.extract_stack() if Path(f.filename).parent in FOLDERS and f.filename != __file__]
    return " < ".join(f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in reversed(own[-2:]))


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        if isinstance(tensor, Away):
            if not is_torchs_own():
                Away.seen.waits.append(f"to the CPU {caller()}")
            return tensor.held.clone()
        return Away(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Move.apply(grad)


class Pretending(TorchFunctionMode):
    """Sends what is made for, or moved to, the device there; and back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (Tensor.numpy, Tensor.__array__) and isinstance(args[0], Away):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func == Tensor.data.__set__ and isinstance(args[0], Away):
            args[0].held = args[1].held
        if func is Tensor.cpu:
            return moved(args[0], torch.device("cpu"))
        if func is Tensor.cuda:
            return moved(args[0], GPU)
        if func is Tensor.new_tensor and isinstance(args[0], Away) and "device" not in kwargs:
            return moved(torch.tensor(*args[1:], dtype=kwargs.get("dtype", args[0].dtype)), GPU)
        if func is Tensor.tolist and isinstance(args[0], Away):
            return moved(args[0], torch.device("cpu")).tolist()
        place, args, kwargs = asked_place(func, args, kwargs)
        if place is None:
            return func(*args, **kwargs)
        if func is Tensor.to:  # nothing that is None, which only stands before what follows it
            types_asked = [a for a in args[1:] if isinstance(a, torch.dtype)]
            given = {k: v for k, v in kwargs.items() if v is not None}
            return moved(args[0].to(*types_asked, **given) if types_asked or given else args[0], place)
        return moved(func(*args, **kwargs), place)


def asked_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, tuple[Any, ...], dict[str, Any]]:
    """The device that a call names, and its arguments without it."""
    if kwargs.get("device") is not None:
        place = torch.device(kwargs.pop("device"))
        return place, args, kwargs
    if func is Tensor.to and len(args) > 1:
        target = args[1]
        if isinstance(target, torch.device | str):
            return torch.device(target), (args[0], *args[2:]), kwargs
        if isinstance(target, Tensor):
            return target.device, (args[0], target.dtype, *args[2:]), kwargs
    return None, args, kwargs


def moved(tensor: Any, place: torch.device) -> Any:
    if not isinstance(tensor, Tensor) or tensor.device.type == place.type:
        return tensor
    if place.type == "meta":
        return tensor.to("meta")
    return _Move.apply(tensor)


def as_its_tensor(module: nn.Module, *args: Any, to: Any, **kwargs: Any) -> nn.Module:
    """``module.to(tensor)`` asks a tensor for its device where no mode can listen."""
    if args and isinstance(args[0], Away):
        return to(module, GPU, args[0].dtype)
    return to(module, *args, **kwargs)


def listening(run_backward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A mode is off while it answers, and a backward pass is such an answer."""
    with Pretending():
        return run_backward(*args, **kwargs)


@contextmanager
def pretended_gpu(patch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Within it ``.to("cuda")`` leads to the device that is not there. Yields what was seen on it."""
    seen = Seen()
    patch.setattr(Away, "seen", seen)
    for name in ("synchronize", "memory_reserved", "empty_cache"):
        patch.setattr(torch.cuda, name, lambda device=None: 0)
    patch.setattr(torch.autograd, "_engine_run_backward", partial(listening, torch.autograd._engine_run_backward))
    patch.setattr(nn.Module, "to", partialmethod(as_its_tensor, to=nn.Module.to))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Pretending():
            yield seen
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
