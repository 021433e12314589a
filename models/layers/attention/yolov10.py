"""Partial self-attention: half of the channels go through attention and a feed-forward layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import attend
from models.layers.attention.ops.shared import divisor_up_to
from models.layers.conv import Conv
from models.spec import channel_rules as rules
from models.spec.registry import register

HEAD_CHANNELS = 64  # YOLOv10's


@register("PSA", channels=rules.same_width, kind="attention", paper="YOLOv10: Real-Time End-to-End Object Detection, arXiv 2405.14458")
class PSA(nn.Module):
    """conv([a, b']), b' = b + attention(b), then b' + FFN(b') (figure 3c of the paper); parameter names are YOLOv10's.

    Args:
        c1: channels in and out.
        e: share of the channels on the attention's path.
    """

    def __init__(self, c1: int, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c1 * e)
        self.cv1 = Conv(c1, 2 * hidden)
        self.cv2 = Conv(2 * hidden, c1)
        self.attn = _Attention(hidden)
        self.ffn = nn.Sequential(Conv(hidden, 2 * hidden), Conv(2 * hidden, hidden, act=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        kept, attended = self.cv1(x).chunk(2, 1)
        attended = attended + self.attn(attended)
        attended = attended + self.ffn(attended)
        return self.cv2(torch.cat((kept, attended), 1))


class _Attention(nn.Module):
    """Self-attention between all pixels; keys are half as wide as values, and a depth-wise 3x3 of the values stands for positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = divisor_up_to(channels, max(1, channels // HEAD_CHANNELS))
        self.value = channels // self.heads
        self.key = max(1, self.value // 2)
        self.qkv = Conv(channels, channels + 2 * self.key * self.heads, act=False)
        self.proj = Conv(channels, channels, act=False)
        self.pe = Conv(channels, channels, 3, g=channels, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        per_head = self.qkv(x).unflatten(1, (self.heads, -1)).split([self.key, self.key, self.value], 2)
        size = x.shape[-2:]  # heads become contiguous groups of channels
        query, key, value = (part.reshape(x.shape[0], self.heads * part.shape[2], *size) for part in per_head)
        return self.proj(attend(query, key, value, heads=self.heads) + self.pe(value))
