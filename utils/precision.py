"""Precision: the type that the network runs in, the gradient scaler that float16 needs, and the kernels that a GPU chooses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from utils.errors import UserError

MIN_SCALE = 1.0  # of a gradient scaler: gradients that are non-finite at this scale are not due to scaling


def precision_of(choice: str, device: torch.device) -> torch.dtype | None:
    """The type that ``--amp`` means on this device; None is plain float32.

    ``auto`` is float16 on a GPU and nothing elsewhere: on a CPU lower precision is usually slower.

    Raises:
        UserError: the device cannot train in it.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return None
    if choice in ("auto", "fp16"):
        if device.type != "cuda":
            raise UserError(f"--amp fp16: needs a GPU, this is {device.type}; use --amp bf16 or --amp off")
        return torch.float16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("--amp bf16: this GPU has no bfloat16; use --amp fp16")
    return torch.bfloat16


def choose_kernels(*, deterministic: bool, sizes_vary: bool) -> None:
    """Sets what cuDNN and cuBLAS may choose; without effect on a CPU.

    TensorFloat-32 (10 bits of mantissa, about 1e-3 relative) serves float32 products, and cuDNN times its convolutions once for each size
    and keeps the fastest; neither with ``--deterministic``. Timing does not pay where sizes vary.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.benchmark = not (deterministic or sizes_vary)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """The context in which the network runs."""
    return torch.autocast(device.type, dtype=dtype) if dtype is not None else nullcontext()


def gradient_scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """A gradient scaler, enabled for float16 only."""
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def update_scale(scaler: torch.amp.GradScaler, *, non_finite: Tensor) -> None:
    """Updates the scale after a step: lower where the gradient overflowed, higher after many steps that did not. Does not synchronize.

    torch alone would lower the scale to zero on losses or gradients that are non-finite at any scale. Here a non-finite loss leaves the
    scale as it is, and ``MIN_SCALE`` is its lower bound.

    Args:
        non_finite: () bool on the device, whether a loss of the step was non-finite.
    """
    if not scaler.is_enabled():
        return
    one = torch.ones((), device=non_finite.device)
    before = scaler.scale(one)
    scaler.update()
    scaler.update(torch.where(non_finite, before, scaler.scale(one)).clamp(min=MIN_SCALE))
