"""Several networks side by side: parameters, GFLOPs with attention and as papers print them, memory that training keeps, time and FPS."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.analysis.operations import multiply_adds
from models.model import Model
from utils.text_table import text_table

REPEATS = 10
WARM_UPS = 2
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class NetworkCost:
    """The cost of a network for one forward pass of a batch; GFLOPs are of one image, two for each multiply-add."""

    model: str
    layers: int
    parameters: int
    gflops: float  # every convolution and matrix product, attention included
    customary_gflops: float  # convolutions and linear layers that are modules, as common counters and so most papers have it
    kept_bytes: int  # by autograd for the backward pass
    seconds: float  # forward and decoding, median
    spread_seconds: float  # interquartile range
    batch: int

    @property
    def fps(self) -> float:
        """Images a second."""
        return self.batch / self.seconds


def customary_multiply_adds(model: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of the convolutions and linear layers that are modules of the network, in one forward pass; what is computed outside
    such modules, as the products of attention, is left out."""
    total = 0

    def count(layer: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, _TRANSPOSED):
            total += given[0].numel() * layer.weight.numel() // layer.in_channels
        else:
            total += output.numel() * layer.weight.numel() // len(layer.weight)

    layers = [m for m in model.modules() if isinstance(m, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def median_seconds(calls: Mapping[str, Callable[[], Any]], *, repeats: int = REPEATS) -> dict[str, tuple[float, float]]:
    """Median and interquartile range of each call's duration; the calls alternate, so that a disturbance meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-WARM_UPS, repeats):
        for name, call in calls.items():
            _synchronise()
            start = time.perf_counter()
            call()
            _synchronise()
            if repeat >= 0:
                times[name].append(time.perf_counter() - start)
    found = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        found[name] = middle, high - low
    return found


def comparison_table(costs: Sequence[NetworkCost]) -> str:
    """A row a network, as text."""
    lines = [("model", "layers", "parameters", "GFLOPs", "customary", "kept MiB", "ms", "IQR ms", "FPS")]
    for c in costs:
        times = (f"{c.seconds * 1e3:.1f}", f"{c.spread_seconds * 1e3:.1f}", f"{c.fps:.1f}")
        sizes = (str(c.layers), f"{c.parameters:,}", f"{c.gflops:.2f}", f"{c.customary_gflops:.2f}", f"{c.kept_bytes / 2**20:.1f}")
        lines.append((c.model, *sizes, *times))
    return text_table(lines, right=range(1, len(lines[0])))


def forward_and_decode(model: Model, images: Tensor) -> Any:
    """What is timed: predictions of a batch, without suppression."""
    with torch.no_grad():
        return model.head.decode(model(images))


def counted_gflops(model: Model, image: Tensor) -> tuple[float, float]:
    """GFLOPs of one image (1, C, H, W), with attention and the customary ones."""
    return 2e-9 * multiply_adds(model, image), 2e-9 * customary_multiply_adds(model, image)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
