"""Contextual transformer: a 3x3 convolution gives the keys a context, and keys and queries determine how values are aggregated.

Contextual Transformer Networks for Visual Recognition, arXiv 2107.12292.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.neighbourhood import Neighbourhood, neighbourhood_sum
from models.layers.attention.ops.shared import PooledBatchNorm2d, conv_bn_relu, divisor_up_to, global_mean
from models.spec import channel_rules as rules
from models.spec.registry import register

KEY_GROUPS = 4  # of the static context's convolution
SHARED = 8  # channels that share a head's local matrix
PAPER = "Contextual Transformer Networks for Visual Recognition, arXiv 2107.12292"


@register("CoTAttention", "CoT", channels=rules.same_width, kind="attention", paper=PAPER)
class CoTAttention(nn.Module):
    """Static context K¹ = conv_kxk(x), local matrices A = W_δ ReLU(W_θ [K¹, x]), dynamic context K² = SiLU(BN(V ⊛ A)) (equations 4 and 5).

    K¹ and K² are blended per channel by a softmax from the mean of their sum, as section 3.2 of the paper fuses them.

    Args:
        dim: channels in and out.
        kernel_size: of both contexts, odd.
    """

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.kernel = kernel_size
        self.heads = dim // divisor_up_to(dim, SHARED)
        hidden = max(1, dim // 2)
        fused = max(dim // 4, 32)
        key = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=divisor_up_to(dim, KEY_GROUPS), bias=False)
        self.key_embed = nn.Sequential(key, nn.BatchNorm2d(dim), nn.ReLU())
        self.value_embed = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim))
        matrices = kernel_size**2 * self.heads
        self.attention_embed = nn.Sequential(
            *conv_bn_relu(2 * dim, hidden), nn.Conv2d(hidden, matrices, 1), nn.GroupNorm(self.heads, matrices)
        )
        self.bn = nn.BatchNorm2d(dim)
        self.fuse = nn.Sequential(nn.Conv2d(dim, fused, 1), PooledBatchNorm2d(fused), nn.ReLU(), nn.Conv2d(fused, 2 * dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        static = self.key_embed(x)
        matrices = self.attention_embed(torch.cat((static, x), 1))  # (B, heads kernel², H, W)
        dynamic = F.silu(self.bn(self._mix(self.value_embed(x), matrices)))
        choice = self.fuse(global_mean(static + dynamic)).unflatten(1, (2, -1)).softmax(1).to(x.dtype)  # (B, 2, C, 1, 1)
        return static * choice[:, 0] + dynamic * choice[:, 1]

    def _mix(self, value: Tensor, matrices: Tensor) -> Tensor:
        """Σ neighbours, each head's channels weighted alike: (B, C, H, W), (B, heads kernel², H, W) -> (B, C, H, W)."""
        weights = matrices.unflatten(1, (self.heads, self.kernel**2)).movedim(2, 0)  # (neighbours, B, heads, H, W)
        padded = F.pad(value, [self.kernel // 2] * 4)
        return neighbourhood_sum(weights, padded, Neighbourhood(self.kernel, self.heads))
