"""Double attention: gather a few descriptors of the whole map, then distribute to each pixel its own mixture of them."""

from __future__ import annotations

from torch import Tensor, nn

from models.spec import channel_rules as rules
from models.spec.registry import register


@register(
    "A2Attention",
    "DoubleAttention",
    channels=rules.same_width,
    kind="attention",
    paper="A²-Nets: Double Attention Networks, arXiv 1810.11579",
)
class A2Attention(nn.Module):
    """x + W [A softmax_pixels(B)ᵀ] softmax_descriptors(V) (equations 4 to 6 of the paper); linear in the number of pixels.

    Args:
        channels: channels in and out.
        reduction: features and descriptors are ``channels // reduction`` each, at least 1.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.convA = nn.Conv2d(channels, hidden, 1)
        self.convB = nn.Conv2d(channels, hidden, 1)
        self.convV = nn.Conv2d(channels, hidden, 1)
        self.conv_reconstruct = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        features = self.convA(x).flatten(2)  # (B, m, N)
        gather = self.convB(x).flatten(2).softmax(2).to(features.dtype)  # (B, n, N)
        spread = self.convV(x).flatten(2).softmax(1).to(features.dtype)  # (B, n, N)
        descriptors = features @ gather.transpose(1, 2)  # (B, m, n)
        return x + self.conv_reconstruct((descriptors @ spread).unflatten(2, x.shape[-2:]))
