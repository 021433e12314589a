"""Counting multiply-adds operator by operator, so that attention is not free however it is written.

torch's FlopCounterMode sees every convolution, matrix product and fused attention. It does not see torchvision's deformable convolution,
nor a matrix product that is written out as products and sums, as attention over a pixel's neighbours is where nothing is unfolded.
Both are added here. What is element-wise by nature (activations, norms, gates, pooling) counts as nothing, as in every published figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten


def multiply_adds(model: Callable[..., Any], *inputs: Any) -> int:
    """Multiply-adds of one forward pass, matrix products and attention included."""
    with torch.no_grad(), OperationCounter() as counter:
        model(*inputs)
    return counter.total


class OperationCounter:
    """Counts while it is entered.

    Attributes:
        direct: multiply-adds of operators that are convolutions, matrix products or attention by themselves.
        written_out: those of matrix products written as products and sums.
    """

    def __init__(self) -> None:
        self._operators = FlopCounterMode(display=False, custom_mapping=_unlisted())
        self._products = _SummedProducts()

    def __enter__(self) -> OperationCounter:
        self._operators.__enter__()
        self._products.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._products.__exit__(*raised)
        self._operators.__exit__(*raised)

    @property
    def direct(self) -> int:
        return self._operators.get_total_flops() // 2

    @property
    def written_out(self) -> int:
        return self._products.total

    @property
    def total(self) -> int:
        return self.direct + self.written_out


class _SummedProducts(TorchDispatchMode):
    """A product of two tensors that is summed, at once or term by term, is a matrix product: one multiply-add an entry.

    That is ``(a * b).sum(dim)``, ``torch.addcmul(total, a, b)``, and the product that such a sum of terms begins with, each also in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._products: Any = WeakIdKeyDictionary()  # tensors that are products of two and are not counted yet

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (aten.mul.Tensor, aten.mul.out) and all(isinstance(factor, Tensor) and factor.numel() > 1 for factor in args):
            self._products[result] = True
        elif func in (aten.addcmul.default, aten.addcmul_.default):
            self.total += result.numel() + self._counted_product(args[0])
        elif func in (aten.sum.dim_IntList, aten.sum.IntList_out):
            self.total += self._counted_product(args[0])
        return result

    def _counted_product(self, term: Tensor) -> int:
        return term.numel() if self._products.pop(term, False) else 0


def _unlisted() -> dict[Any, Any]:
    """Rules for operators that torch's counter lacks: deformable convolution, and before torch 2.7 the CPU's fused attention."""
    rules: dict[Any, Any] = {}
    on_cpu = aten._scaled_dot_product_flash_attention_for_cpu
    if on_cpu not in flop_registry:
        rules[on_cpu] = lambda query, key, value, *_, out_shape=None, **__: sdpa_flop_count(query, key, value)
    if hasattr(torch.ops.torchvision, "deform_conv2d"):  # registered with torchvision, which layers that use it import
        rules[torch.ops.torchvision.deform_conv2d] = _deform_conv_flops
    return rules


def _deform_conv_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of a convolution of the same shape; the bilinear samples count as nothing, as all interpolation."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])
