"""External attention: pixels attend to a small learned memory, common to all images."""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLinear, full_precision
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks, arXiv 2105.02358"


@register("ExternalAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class ExternalAttention(nn.Module):
    """Norm(x M_kᵀ) M_v (equations 5 to 9 of the paper); Norm is a softmax over pixels, then a division by the sum over the memory.

    Linear in the number of pixels. The normalisation is in float32: one pixel's share of a large map is small.

    Args:
        d_model: channels in and out.
        S: rows of the memory.
    """

    def __init__(self, d_model: int, S: int = 64) -> None:
        super().__init__()
        self.mk = ChannelLinear(d_model, S, bias=False)
        self.mv = ChannelLinear(S, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        logits = self.mk(x)
        with full_precision(x):
            weights = logits.float().flatten(2).softmax(2)  # (B, S, N)
            weights = weights / (weights.sum(1, keepdim=True) + 1e-9)
        return self.mv(weights.to(logits.dtype).reshape(logits.shape))
