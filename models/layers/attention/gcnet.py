"""Global context: one softmax over the map, shared by all pixels, and a bottleneck that adds what it gathers."""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLayerNorm
from models.layers.explained import PlaneMap, Query, View
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond, arXiv 1904.11492"


@register("GC", "GlobalContext", channels=rules.same_width, kind="attention", paper=PAPER)
class GC(nn.Module):
    """x + W₂ ReLU(LN(W₁ Σ softmax(Wₖ x) x)) (equation 5 of the paper). W₂ starts at zero, so the module starts as the identity.

    Args:
        channels: channels in and out.
        reduction: the hidden width is ``channels // reduction``, at least 4, because a layer norm over one channel is a constant.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(4, channels // reduction)
        self.conv_mask = nn.Conv2d(channels, 1, 1)
        self.channel_add_conv = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), ChannelLayerNorm(hidden), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )
        for parameter in self.channel_add_conv[3].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        weights = self._weights(x)
        context = x.flatten(2) @ weights.transpose(1, 2)  # (B, C, 1)
        return x + self.channel_add_conv(context.unsqueeze(3))

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """The one map that all pixels attend with."""
        return (PlaneMap("attention, the same of all queries", self._weights(x)[0, 0].unflatten(0, x.shape[2:])),)

    def _weights(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, N)."""
        return self.conv_mask(x).flatten(2).softmax(2).to(x.dtype)  # type: ignore[no-any-return]
