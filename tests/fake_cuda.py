"""A fake CUDA device: tensors report ``cuda:0`` and compute on the CPU.

Without a GPU it finds code that creates a tensor on the wrong device, synchronises with the device, copies to it while the host waits, or
branches on the device type. What a real device refuses (operands on two devices, ``numpy()``) is refused here. Kernels and mixed precision
are those of the CPU.
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
import torchvision  # noqa: F401 - registers the operators that are named below
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[1]
PARTS = ("data", "engine", "models", "tasks", "tests", "utils")
FOLDERS = {ROOT, *(p.parent for part in PARTS for p in (ROOT / part).rglob("*.py"))}  # a .venv may lie beside them
aten = torch.ops.aten
# Operators that synchronise: the size of the result, or its value on the host, depends on values on the device.
SYNC_OPS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.equal,
    aten.is_nonzero, aten.bincount,
}  # fmt: skip
# Operators without a deterministic CUDA kernel, from the list of torch.use_deterministic_algorithms.
NONDETERMINISTIC_OPS = {
    aten._adaptive_avg_pool2d_backward, aten._adaptive_avg_pool3d_backward, aten.adaptive_max_pool2d_backward, aten.avg_pool3d_backward,
    aten.fractional_max_pool2d_backward, aten.max_unpool2d, aten.upsample_linear1d_backward, aten.upsample_bilinear2d_backward,
    aten.upsample_bicubic2d_backward, aten.upsample_trilinear3d_backward, aten.reflection_pad1d_backward, aten.reflection_pad2d_backward,
    aten.nll_loss_forward, aten.nll_loss2d_forward, aten.put_, aten.histc, aten.grid_sampler_2d_backward, aten.scatter_reduce,
    aten.scatter_reduce_, aten.index_reduce_,
    torch.ops.torchvision._deform_conv2d_backward,
}  # fmt: skip
INDEX_OPS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray}  # with a device: made on the host, then copied
MIXED_DEVICE_OPS = {aten.copy_, aten._to_copy, aten.set_}


@dataclass
class DeviceRecord:
    """What was recorded on the device: the operator and the lines of the project that called it, innermost first."""

    syncs: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)  # from the host, which waits for them: Python values, and tensors without non_blocking
    nondeterministic: list[str] = field(default_factory=list)


class FakeCudaTensor(Tensor):
    """A tensor of the fake device; ``host`` holds its values."""

    host: Tensor
    seen = DeviceRecord()
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> FakeCudaTensor:
        out = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, device="cpu"
        )
        out.host = host
        return out

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FakeCudaTensor({self.host!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = FakeCudaTensor(self.host.clone()).requires_grad_(self.requires_grad)
        copy._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saves the host tensor, as ``map_location="cpu"`` would load it."""
        return self.host.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refuse_mixed_devices(func, args, kwargs)
        record_op(func, args, kwargs)
        out = func(*tree_map_only(FakeCudaTensor, host_of, args), **tree_map_only(FakeCudaTensor, host_of, kwargs))
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, FakeCudaTensor, out))


def host_of(tensor: FakeCudaTensor) -> Tensor:
    return tensor.host


def refuse_mixed_devices(func: Any, args: Any, kwargs: Any) -> None:
    """Refuses what CUDA refuses; tensors without dimensions and index tensors may be on the CPU."""
    packet = func.overloadpacket
    on_cpu = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, FakeCudaTensor)]
    if packet in MIXED_DEVICE_OPS or not on_cpu:
        return
    if packet in INDEX_OPS and isinstance(args[0], FakeCudaTensor):
        if any(isinstance(t, Tensor) and not isinstance(t, FakeCudaTensor) for t in args[1]):
            FakeCudaTensor.seen.copies.append(f"index {caller()}")
        on_cpu = [t for t in args[2:3] if isinstance(t, Tensor) and not isinstance(t, FakeCudaTensor)]
    if any(t.dim() or packet in (aten.cat, aten.stack) for t in on_cpu):
        raise RuntimeError(f"{func}: tensors on cuda:0 and on the CPU, of {[tuple(t.shape) for t in on_cpu]}")


def record_op(func: Any, args: Any, kwargs: Any) -> None:
    packet = func.overloadpacket
    by_mask = packet in INDEX_OPS and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if by_mask and packet is not aten.index:
        by_mask = args[2].numel() != 1  # assigning a scalar needs no count of selected elements
    repeats = packet is aten.repeat_interleave and kwargs.get("output_size") is None
    if packet in SYNC_OPS or by_mask or repeats:
        FakeCudaTensor.seen.syncs.append(f"{packet} {caller()}")
    if packet in NONDETERMINISTIC_OPS and not {"amax", "amin"}.intersection(a for a in args if isinstance(a, str)):
        FakeCudaTensor.seen.nondeterministic.append(f"{packet} {caller()}")


def is_called_by_torch() -> bool:
    """Whether torch's optimizers or gradient clipping call: they read the device from C++, where it is the CPU."""
    between = (__file__, "torch/autograd/function.py", "torch/overrides.py")
    asking = next(f.filename for f in reversed(traceback.extract_stack()) if not f.filename.endswith(between))
    return "/torch/optim/" in asking or asking.endswith("clip_grad.py")


def caller() -> str:
    """The lines of the project on the stack, innermost first."""
    own = [f for f in traceback.extract_stack() if Path(f.filename).parent in FOLDERS and f.filename != __file__]
    return " < ".join(f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in reversed(own))


def record_copy(func: Any, kwargs: dict[str, Any]) -> None:
    """Records Python values put on the device, and host tensors moved there while the host waits.

    What a test or ``Module.to`` moves is not recorded.
    """
    lines = caller()
    from_python = func in FROM_PYTHON or func is Tensor.new_tensor
    moves = func in (Tensor.to, Tensor.cuda) and not kwargs.get("non_blocking") and bool(lines) and not lines.startswith("tests/")
    if from_python or (moves and not is_called_by_module_to()):
        FakeCudaTensor.seen.copies.append(f"{func.__name__} {lines}")


def is_called_by_module_to() -> bool:
    return any(f.filename.endswith("torch/nn/modules/module.py") and f.name == "convert" for f in traceback.extract_stack())


class _Transfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeCudaTensor):
            if not is_called_by_torch():
                FakeCudaTensor.seen.syncs.append(f"to the CPU {caller()}")
            return tensor.host.clone()
        return FakeCudaTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Transfer.apply(grad)


class FakeCudaMode(TorchFunctionMode):
    """Redirects creation on the device and moves to and from it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (Tensor.numpy, Tensor.__array__) and isinstance(args[0], FakeCudaTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func == Tensor.data.__set__ and isinstance(args[0], FakeCudaTensor):
            args[0].host = args[1].host
        if func is Tensor.cpu:
            return to_device(args[0], torch.device("cpu"))
        if func is Tensor.cuda:
            record_copy(func, kwargs)
            return to_device(args[0], GPU)
        if func is Tensor.new_tensor and isinstance(args[0], FakeCudaTensor) and "device" not in kwargs:
            record_copy(func, kwargs)
            return to_device(torch.tensor(*args[1:], dtype=kwargs.get("dtype", args[0].dtype)), GPU)
        if func is Tensor.tolist and isinstance(args[0], FakeCudaTensor):
            return to_device(args[0], torch.device("cpu")).tolist()
        place, args, kwargs = requested_device(func, args, kwargs)
        if place is None:
            return func(*args, **kwargs)
        if place.type == "cuda" and not isinstance(args[0] if args else None, FakeCudaTensor):
            record_copy(func, kwargs)
        if func is Tensor.to:  # None only fills positions before later arguments
            types_asked = [a for a in args[1:] if isinstance(a, torch.dtype)]
            given = {k: v for k, v in kwargs.items() if v is not None}
            return to_device(args[0].to(*types_asked, **given) if types_asked or given else args[0], place)
        return to_device(func(*args, **kwargs), place)


def requested_device(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.device | None, tuple, dict[str, Any]]:
    """The device that a call requests, and the arguments without it."""
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


def to_device(tensor: Any, place: torch.device) -> Any:
    if not isinstance(tensor, Tensor) or tensor.device.type == place.type:
        return tensor
    if place.type == "meta":
        return tensor.to("meta")
    return _Transfer.apply(tensor)


def move_module(module: nn.Module, *args: Any, to: Any, **kwargs: Any) -> nn.Module:
    """``module.to(tensor)`` reads the device of the tensor in C++, out of reach of a mode."""
    if args and isinstance(args[0], FakeCudaTensor):
        return to(module, GPU, args[0].dtype)
    return to(module, *args, **kwargs)


def run_backward_in_mode(run_backward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A mode is disabled within its own handler, from which the backward pass runs, so it is enabled again."""
    with FakeCudaMode():
        return run_backward(*args, **kwargs)


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[DeviceRecord]:
    """Within this context ``.to("cuda")`` moves to the fake device. Yields the record of what happened on it."""
    seen = DeviceRecord()
    patch.setattr(FakeCudaTensor, "seen", seen)
    for name in ("synchronize", "memory_reserved", "empty_cache", "set_device"):
        patch.setattr(torch.cuda, name, lambda device=None: 0)
    patch.setattr(torch.autograd, "_engine_run_backward", partial(run_backward_in_mode, torch.autograd._engine_run_backward))
    patch.setattr(nn.Module, "to", partialmethod(move_module, to=nn.Module.to))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeCudaMode():
            yield seen
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
