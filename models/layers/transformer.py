"""YOLOv5's transformer encoder over the pixels of a map (after ViT, arXiv 2010.11929, without layer norms)."""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.conv import Conv
from models.layers.csp import C3
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, arXiv 2010.11929"


class TransformerLayer(nn.Module):
    """Self-attention and a linear pair, each with a residual, no norms; (L, B, C) to the same."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.q = nn.Linear(channels, channels, bias=False)
        self.k = nn.Linear(channels, channels, bias=False)
        self.v = nn.Linear(channels, channels, bias=False)
        self.ma = nn.MultiheadAttention(channels, heads)
        self.fc1 = nn.Linear(channels, channels, bias=False)
        self.fc2 = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ma(self.q(x), self.k(x), self.v(x), need_weights=False)[0] + x
        return self.fc2(self.fc1(x)) + x


@register("TransformerBlock", channels=rules.out_width, kind="attention", paper=PAPER)
class TransformerBlock(nn.Module):
    """A learned position (a linear layer of the pixel itself) and ``n`` transformer layers; (B, c1, H, W) to (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, heads: int = 4, n: int = 1) -> None:
        super().__init__()
        self.conv = Conv(c1, c2) if c1 != c2 else None
        self.linear = nn.Linear(c2, c2)
        self.tr = nn.Sequential(*(TransformerLayer(c2, heads) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = self.conv(x)
        b, c, h, w = x.shape
        pixels = x.flatten(2).permute(2, 0, 1)  # (H·W, B, C)
        return self.tr(pixels + self.linear(pixels)).permute(1, 2, 0).reshape(b, c, h, w)


@register("C3TR", channels=rules.out_width_repeated, kind="attention", paper=PAPER)
class C3TR(C3):
    """C3 with a transformer on the long path (YOLOv5); (B, c1, H, W) to (B, c2, H, W)."""

    def stack(self, c: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return TransformerBlock(c, c, 4, n)
