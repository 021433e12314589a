"""Squeeze and excitation: a channel's weight from the means of all channels."""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLinear
from models.layers.attention.ops.shared import global_mean
from models.layers.explained import explain_gate
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("SE", "SEAttention", channels=rules.same_width, kind="attention", paper="Squeeze-and-Excitation Networks, arXiv 1709.01507")
class SE(nn.Module):
    """x · σ(W₂ ReLU(W₁ mean(x))) (equations 2 to 4 of the paper); no biases, as published.

    Args:
        channel: channels in and out.
        reduction: the hidden width is ``channel // reduction``, at least 1.
    """

    def __init__(self, channel: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channel // reduction)
        self.fc = nn.Sequential(
            ChannelLinear(channel, hidden, bias=False), nn.ReLU(), ChannelLinear(hidden, channel, bias=False), nn.Sigmoid()
        )

    explain = explain_gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """The channels' weights: (B, C, H, W) -> (B, C, 1, 1)."""
        return self.fc(global_mean(x))  # type: ignore[no-any-return]
