"""Convolutional block attention: a gate over channels, then a gate over pixels.

CBAM: Convolutional Block Attention Module, arXiv 1807.06521.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLinear
from models.layers.attention.ops.shared import channel_extremes, global_max, global_mean
from models.layers.explained import explain_gate
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "CBAM: Convolutional Block Attention Module, arXiv 1807.06521"
ROW_KERNELS = (3, 7)  # those that other programs' rows write by place


@register("CBAM", channels=rules.same_width, kind="attention", paper=PAPER)
class CBAM(nn.Module):
    """Channel gate, then spatial gate (equations 1 to 3 of the paper).

    Args:
        gate_channels: channels in and out.
        reduction_ratio: the channel gate's hidden width is ``gate_channels // reduction_ratio``, at least 1.
        pool_types: how the channel gate pools the map, any of avg, max, lp (Euclidean norm) and lse (log of the sum of exponentials).
        no_spatial: leave the spatial gate out.
        kernel_size: of the spatial gate, odd.

    Raises:
        ValueError: an unknown way of pooling, or none.
    """

    def __init__(
        self,
        gate_channels: int,
        reduction_ratio: int = 16,
        pool_types: Sequence[str] = ("avg", "max"),
        no_spatial: bool = False,
        *,
        kernel_size: int = 7,
    ) -> None:
        super().__init__()
        self.ChannelGate = ChannelGate(gate_channels, reduction_ratio, pool_types)
        self.SpatialGate = nn.Identity() if no_spatial else SpatialGate(kernel_size)

    @staticmethod
    def read_row(options: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``[7]`` is the kernel, as in the rows of YOLOv8's CBAM; ``[16, 7]`` reduction and kernel; else the options by place."""
        *before, last = options or (None,)
        if len(before) < 2 and type(last) is int and last in ROW_KERNELS:
            return tuple(before), {"kernel_size": last}
        return tuple(options), {}

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.SpatialGate(self.ChannelGate(x))


def euclidean_norm(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1), in float32; its gradient at a map of zeros is 0."""
    return x.float().square().sum((2, 3), keepdim=True).clamp(min=1e-24).sqrt().to(x.dtype)


def log_sum_exp(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1)."""
    return torch.logsumexp(x, (2, 3), keepdim=True)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {"avg": global_mean, "max": global_max, "lp": euclidean_norm, "lse": log_sum_exp}


class ChannelGate(nn.Module):
    """x · σ(Σ MLP(pooled)), one MLP for all ways of pooling: mean and maximum in the paper."""

    def __init__(self, channels: int, reduction: int = 16, pool_types: Sequence[str] = ("avg", "max")) -> None:
        super().__init__()
        if not isinstance(pool_types, (list, tuple)) or not pool_types or not set(map(str, pool_types)) <= POOLS.keys():
            raise ValueError(f"CBAM: pool_types should be a list of {', '.join(POOLS)}, not {pool_types!r}")
        self.pool_types = tuple(pool_types)
        hidden = max(1, channels // reduction)
        # the published MLP flattens at place 0
        self.mlp = nn.Sequential(nn.Identity(), ChannelLinear(channels, hidden), nn.ReLU(), ChannelLinear(hidden, channels))

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """The channels' weights: (B, C, H, W) -> (B, C, 1, 1)."""
        first, *others = (self.mlp(POOLS[name](x)) for name in self.pool_types)
        return torch.sigmoid(sum(others, first))


class SpatialGate(nn.Module):
    """x · σ(BN(conv([max, mean] over the channels))), 7x7 in the paper."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.spatial = nn.Sequential()
        self.spatial.add_module("conv", nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False))
        self.spatial.add_module("bn", nn.BatchNorm2d(1))

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """The pixels' weights: (B, C, H, W) -> (B, 1, H, W)."""
        return torch.sigmoid(self.spatial(torch.cat(channel_extremes(x), 1)))


@register("ChannelAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class ChannelAttention(nn.Module):
    """x · σ(W mean(x)): the single full-width layer that YOLOv8 has under this name.

    Args:
        channels: channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """The channels' weights: (B, C, H, W) -> (B, C, 1, 1)."""
        return torch.sigmoid(self.fc(global_mean(x)))


@register("SpatialAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class SpatialAttention(nn.Module):
    """x · σ(conv([mean, max] over the channels)), as YOLOv8 has it under this name.

    Args:
        channels: channels in and out; any number, because the gate has two input maps only.
        kernel_size: 3 or 7.
    """

    def __init__(self, channels: int | None = None, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size not in (3, 7):
            raise ValueError(f"SpatialAttention: kernel_size should be 3 or 7, not {kernel_size}")
        self.cv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """The pixels' weights: (B, C, H, W) -> (B, 1, H, W)."""
        largest, mean = channel_extremes(x)
        return torch.sigmoid(self.cv1(torch.cat((mean, largest), 1)))
