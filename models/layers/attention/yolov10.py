"""Partial self-attention: half of the channels go through attention and a feed-forward layer, once or in a row of blocks.

YOLOv10: Real-Time End-to-End Object Detection, arXiv 2405.14458; the rows of blocks are YOLO11's, for which there is no paper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.common import attend
from models.layers.attention.ops.shared import divisor_up_to
from models.layers.conv import Conv
from models.layers.csp import SplitAggregation
from models.layers.explained import Query, View, head_maps, query_weights, split_heads
from models.spec import channel_rules as rules
from models.spec.registry import register

HEAD_CHANNELS = 64  # YOLOv10's
KEY_RATIO = 0.5  # width of queries and keys, in multiples of the values'
PAPER = "YOLOv10: Real-Time End-to-End Object Detection, arXiv 2405.14458"


class Attention(nn.Module):
    """Self-attention between all pixels, and a depth-wise 3x3 of the values in place of positions (figure 3c of the paper).

    Args:
        dim: channels in and out.
        num_heads: number of heads.
        attn_ratio: width of queries and keys, in multiples of the values'.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int = 8, attn_ratio: float = KEY_RATIO) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"attention: {num_heads} heads should divide {dim} channels")
        self.heads = num_heads
        self.value = dim // num_heads
        self.key = max(1, int(self.value * attn_ratio))
        self.qkv = Conv(dim, dim + 2 * self.key * num_heads, act=False)
        self.proj = Conv(dim, dim, act=False)
        self.pe = Conv(dim, dim, 3, g=dim, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        query, key, value = self._projected(x)
        return self.proj(attend(query, key, value, heads=self.heads) + self.pe(value))

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """The affinities of one pixel to all others."""
        return head_maps(self.weights_of(x, query), (x.shape[2], x.shape[3]))

    def weights_of(self, x: Tensor, query: Query) -> Tensor:
        """What one pixel gives each pixel's value: (1, C, H, W) -> (heads, H W)."""
        queries, keys, _ = (split_heads(part, self.heads) for part in self._projected(x))
        return query_weights(queries[:, query.cell_number(x.shape[2], x.shape[3])], keys, scale=self.key**-0.5)

    def _projected(self, x: Tensor) -> list[Tensor]:
        """Query, key and value, heads as contiguous groups of channels: each (B, heads d, H, W)."""
        per_head = self.qkv(x).unflatten(1, (self.heads, -1)).split([self.key, self.key, self.value], 2)
        return [part.reshape(x.shape[0], self.heads * part.shape[2], *x.shape[-2:]) for part in per_head]


@register("PSABlock", channels=rules.same_width, kind="attention", paper=PAPER)
class PSABlock(nn.Module):
    """x + attention(x), then x + FFN(x) (figure 3c of the paper); parameter names are YOLO11's.

    Args:
        c: channels in and out.
        attn_ratio: width of queries and keys, in multiples of the values'.
        num_heads: number of heads.
        shortcut: both residuals.

    Raises:
        ValueError: ``num_heads`` does not divide ``c``.
    """

    def __init__(self, c: int, attn_ratio: float = KEY_RATIO, num_heads: int = 4, shortcut: bool = True) -> None:
        super().__init__()
        self.attn = Attention(c, num_heads, attn_ratio)
        self.ffn = nn.Sequential(Conv(c, 2 * c), Conv(2 * c, c, act=False))
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.attn(x) if self.add else self.attn(x)
        return x + self.ffn(x) if self.add else self.ffn(x)


class PartialAttention(nn.Module):
    """conv([a, f(b)]) of the two parts that a 1x1 convolution gives; ``attended`` is f.

    Args:
        channels: in and out.
        hidden: of each part.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.cv1 = Conv(channels, 2 * hidden)
        self.cv2 = Conv(2 * hidden, channels)

    def attended(self, x: Tensor) -> Tensor:
        """(B, hidden, H, W) -> the same."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        kept, other = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat((kept, self.attended(other)), 1))


@register("PSA", channels=rules.same_width, kind="attention", paper=PAPER)
class PSA(PartialAttention):
    """Partial self-attention: half of the channels go through attention and a feed-forward layer.

    conv([a, b']), b' = b + attention(b), then b' + FFN(b') (figure 3c of the paper); parameter names are YOLOv10's.

    Args:
        c1: channels in and out.
        e: share of the channels on the attention's path.
    """

    def __init__(self, c1: int, e: float = 0.5) -> None:
        hidden = int(c1 * e)
        super().__init__(c1, hidden)
        self.attn = Attention(hidden, heads_of(hidden))
        self.ffn = nn.Sequential(Conv(hidden, 2 * hidden), Conv(2 * hidden, hidden, act=False))

    def attended(self, x: Tensor) -> Tensor:
        """(B, hidden, H, W) -> the same."""
        x = x + self.attn(x)
        return x + self.ffn(x)


@register("C2PSA", channels=rules.out_width_repeated, kind="attention", paper=PAPER)
class C2PSA(PartialAttention):
    """PSA with a row of blocks on the attention's path (YOLO11); (B, C, H, W) to the same.

    Args:
        c1: input channels.
        c2: output channels, equal to ``c1``.
        n: number of blocks.
        e: share of the channels on the attention's path.

    Raises:
        ValueError: the widths differ.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, e: float = 0.5) -> None:
        _require_same_width(c1, c2, "C2PSA")
        hidden = int(c1 * e)
        super().__init__(c1, hidden)
        self.m = nn.Sequential(*(PSABlock(hidden, KEY_RATIO, heads_of(hidden)) for _ in range(n)))

    def attended(self, x: Tensor) -> Tensor:
        """(B, hidden, H, W) -> the same."""
        return self.m(x)  # type: ignore[no-any-return]


@register("C2fPSA", channels=rules.out_width_repeated, kind="attention", paper=PAPER)
class C2fPSA(SplitAggregation):
    """C2PSA that also passes on what every block gives, as C2f does; (B, C, H, W) to the same.

    Args:
        c1: input channels.
        c2: output channels, equal to ``c1``.
        n: number of blocks.
        e: share of the channels on the attention's path.

    Raises:
        ValueError: the widths differ.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, e: float = 0.5) -> None:
        _require_same_width(c1, c2, "C2fPSA")
        super().__init__(c1, c2, n, e, lambda c: PSABlock(c, KEY_RATIO, heads_of(c)))


def heads_of(channels: int) -> int:
    """Heads of about 64 channels."""
    return divisor_up_to(channels, max(1, channels // HEAD_CHANNELS))


def _require_same_width(c1: int, c2: int, name: str) -> None:
    if c1 != c2:
        raise ValueError(f"{name} keeps its input's width: expected {c1} channels out, got {c2}")
