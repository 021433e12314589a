"""Attention-based intra-scale feature interaction: one transformer layer on the coarsest map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLayerNorm, ChannelLinear, attend
from models.layers.attention.ops.shared import divisor_up_to
from models.spec import channel_rules as rules
from models.spec.registry import register

TEMPERATURE = 10000.0  # of the sine positions


@register("AIFI", channels=rules.same_width, kind="attention", paper="DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069")
class AIFI(nn.Module):
    """LN(x + MHSA(x + p, x + p, x)), then LN(x + FFN(x)) (section 4.2 of the paper), p two-dimensional sine positions of the map.

    Parameter names are those of the PyTorch transformer layer that RT-DETR ports use (``ma.in_proj_weight`` …). Their rows are
    ``[cm, num_heads]`` (``AIFI, [1024, 8]``), with no width in front; both numbers have defaults.

    Args:
        c1: channels in and out, a multiple of 4.
        cm: hidden width of the feed-forward layer.
        num_heads: number of heads, or the next smaller one that divides.
        dropout: after both branches and inside the feed-forward layer.

    Raises:
        ValueError: the channels do not divide by 4.
    """

    published_row = 2  # integers of a row that holds no width: [cm, num_heads]

    def __init__(self, c1: int, cm: int = 2048, num_heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        if c1 % 4:
            raise ValueError(f"AIFI: {c1} channels do not divide by 4, for the sines and cosines of two coordinates")
        self.ma = _SelfAttention(c1, divisor_up_to(c1, num_heads))
        self.fc1 = ChannelLinear(c1, cm)
        self.fc2 = ChannelLinear(cm, c1)
        self.norm1 = ChannelLayerNorm(c1)
        self.norm2 = ChannelLayerNorm(c1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.norm1(x + self.dropout(self.ma(x + sine_positions(x), x)))
        return self.norm2(x + self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x))))))


class _SelfAttention(nn.Module):
    """Multi-head attention with the parameters of ``nn.MultiheadAttention``, on maps."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = ChannelLinear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, placed: Tensor, x: Tensor) -> Tensor:
        """Queries and keys from ``placed``, values from ``x``: (B, C, H, W) twice -> (B, C, H, W)."""
        channels = x.shape[1]
        weight, bias = self.in_proj_weight[:, :, None, None], self.in_proj_bias
        query, key = F.conv2d(placed, weight[: 2 * channels], bias[: 2 * channels]).chunk(2, 1)
        value = F.conv2d(x, weight[2 * channels :], bias[2 * channels :])
        return self.out_proj(attend(query, key, value, heads=self.heads))


def sine_positions(like: Tensor) -> Tensor:
    """Sines and cosines of the row, then of the column, at frequencies falling from 1 to 1/10000: (1, C, H, W)."""
    height, width = like.shape[-2:]
    quarter = like.shape[1] // 4
    frequency = TEMPERATURE ** (-torch.arange(quarter, device=like.device, dtype=torch.float32) / quarter)
    rows, columns = (torch.arange(n, device=like.device, dtype=torch.float32) for n in (height, width))
    down = (frequency[:, None] * rows)[:, :, None].expand(quarter, height, width)
    across = (frequency[:, None] * columns)[:, None, :].expand(quarter, height, width)
    return torch.cat((down.sin(), down.cos(), across.sin(), across.cos())).unsqueeze(0).to(like.dtype)
