"""What the attention modules share: pointwise layers that keep a published Linear's parameters, but work on (B, C, H, W) maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelLinear(nn.Linear):
    """A linear layer over the channels of a map: ``weight`` is (out, in) as in ``nn.Linear``, the work is a 1x1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel; ``weight`` and ``bias`` are (C,). Computed in float32 under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), laid out channels-last in memory (a layout that convolutions take as it is)."""
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops a sample's branch with probability ``rate`` and rescales the others."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep) / keep

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class Mlp(nn.Module):
    """The two-layer perceptron of vision transformers, per pixel: ``fc1``, GELU, ``fc2``."""

    def __init__(self, channels: int, hidden: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = ChannelLinear(channels, hidden)
        self.fc2 = ChannelLinear(hidden, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


def per_channel(vector: Tensor) -> Tensor:
    """A vector (C,) as (1, C, 1, 1), to scale a map."""
    return vector.view(1, -1, 1, 1)


def weighted_sum(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Σ maps[i] · weights[i], with broadcasting, one fused multiply-add a term."""
    total = maps[0] * weights[0]
    for term, weight in zip(maps[1:], weights[1:]):
        total = torch.addcmul(total, term, weight)
    return total
