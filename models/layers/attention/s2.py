"""Split attention over shifted copies: pixels are mixed with their neighbours by moving channels, without a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLinear, full_precision
from models.spec import channel_rules as rules
from models.spec.registry import register


@register(
    "S2Attention",
    channels=rules.same_width,
    kind="attention",
    paper="S²-MLPv2: Improved Spatial-Shift MLP Architecture for Vision, arXiv 2108.01072",
)
class S2Attention(nn.Module):
    """Three copies: shifted along H then W, along W then H, not shifted; blended by split attention (algorithm 1 of the paper).

    A quarter of the channels moves each way by one pixel; the border keeps its value. The published code shifts in place within
    overlapping memory, which has no defined result; here every shifted copy is new. The blend is decided in float32, because it sums over
    all pixels.

    Args:
        channels: channels in and out, a multiple of 4.

    Raises:
        ValueError: the channels do not divide by 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(f"S2Attention moves quarters of the channels; {channels} does not divide by 4")
        self.mlp1 = ChannelLinear(channels, 3 * channels)
        self.mlp2 = ChannelLinear(channels, channels)
        self.split_attention = _SplitAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        first, second, third = self.mlp1(x).chunk(3, 1)
        return self.mlp2(self.split_attention([_shift(first, 2, 3), _shift(second, 3, 2), third]))


class _SplitAttention(nn.Module):
    """Σ branches, weighted per channel by the softmax of an MLP of the sum over branches and pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp1 = ChannelLinear(channels, channels, bias=False)
        self.mlp2 = ChannelLinear(channels, 3 * channels, bias=False)

    def forward(self, branches: list[Tensor]) -> Tensor:
        """Three (B, C, H, W) -> (B, C, H, W)."""
        with full_precision(branches[0]):
            first, second, third = (branch.float().sum((2, 3)) for branch in branches)  # (B, C)
            hidden = F.gelu(F.linear(first + second + third, self.mlp1.weight.float()))
            logits = F.linear(hidden, self.mlp2.weight.float()).unflatten(1, (3, -1))
            weights = logits.softmax(1).to(branches[0].dtype)[..., None, None].unbind(1)  # each (B, C, 1, 1)
        return sum(weight * branch for weight, branch in zip(weights, branches))


def _shift(x: Tensor, first: int, second: int) -> Tensor:
    """Quarters of the channels: forward and back along ``first``, forward and back along ``second``."""
    a, b, c, d = x.chunk(4, 1)
    return torch.cat((_forward(a, first), _back(b, first), _forward(c, second), _back(d, second)), 1)


def _forward(x: Tensor, dim: int) -> Tensor:
    """Each pixel takes its predecessor's value; the first keeps its own."""
    return torch.cat((x.narrow(dim, 0, 1), x.narrow(dim, 0, x.shape[dim] - 1)), dim)


def _back(x: Tensor, dim: int) -> Tensor:
    """Each pixel takes its successor's value; the last keeps its own."""
    return torch.cat((x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, x.shape[dim] - 1, 1)), dim)
