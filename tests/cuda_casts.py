"""CUDA's autocast rules on a CPU: CUDA casts other operators, so mixed types occur that never occur under the CPU's autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# torch's lists for CUDA (docs: "Automatic Mixed Precision", op-specific behaviour), by function name.
HALF = frozenset(
    (
        "__matmul__", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "conv1d", "conv2d", "conv3d",
        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "einsum", "linear", "matmul", "mm", "mv", "prelu",
        "scaled_dot_product_attention",
    )
)  # fmt: skip
FULL = frozenset(
    (
        "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "binary_cross_entropy_with_logits", "cdist", "cosh",
        "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1", "group_norm", "huber_loss",
        "interpolate", "kl_div", "l1_loss", "layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "logsumexp",
        "matrix_norm", "mse_loss", "nll_loss", "norm", "normalize", "pow", "prod", "reciprocal", "renorm", "rsqrt", "sinh",
        "smooth_l1_loss", "softmax", "softmin", "softplus", "sum", "tan", "vector_norm",
    )
)  # fmt: skip
WIDEST = frozenset(
    (
        "addcdiv", "addcmul", "atan2", "bilinear", "cat", "concat", "concatenate", "cross", "dot", "grid_sample", "index_put",
        "scatter_add", "stack", "tensordot",
    )
)  # fmt: skip


class CudaCasts(TorchFunctionMode):
    """Within regions of CPU autocast, operators get the types that CUDA's autocast would give them.

    Products are accumulated in float32, as on a GPU. In-place operators and those with ``out`` are not cast, as in torch.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "out" not in kwargs and torch.is_autocast_enabled("cpu"):
            name, low = getattr(func, "__name__", ""), torch.get_autocast_dtype("cpu")
            to = torch.float32 if name in HALF else _type_for(name, args, kwargs)
            if to is not None:
                given = tree_map(lambda value: _cast(value, low), (args, kwargs)) if name in HALF else (args, kwargs)
                args, kwargs = tree_map(lambda value: _cast(value, to), given)
                with torch.autocast("cpu", enabled=False):  # the CPU's autocast has other lists
                    result = func(*args, **kwargs)
                return result.to(low) if name in HALF else result
        return func(*args, **kwargs)


def _type_for(name: str, args: Any, kwargs: Any) -> torch.dtype | None:
    if name in FULL:
        return None if kwargs.get("dtype") else torch.float32
    if name in WIDEST:
        floats: list[torch.dtype] = []
        tree_map(lambda v: floats.append(v.dtype) if isinstance(v, Tensor) and v.is_floating_point() else None, (args, kwargs))
        return torch.float32 if torch.float32 in floats and torch.float64 not in floats else None
    return None


def _cast(value: Any, to: torch.dtype) -> Any:
    is_cast = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return value.to(to) if is_cast else value
