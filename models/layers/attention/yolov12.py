"""Area attention: softmax attention inside horizontal stripes of the map, and the aggregation block built on it.

YOLOv12: Attention-Centric Real-Time Object Detectors, arXiv 2502.12524.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import attend, pad_to_multiple, per_channel
from models.layers.attention.ops.shared import divisor_up_to
from models.layers.conv import Conv
from models.layers.csp import CSP
from models.spec import channel_rules as rules
from models.spec.registry import register

HEAD_CHANNELS = 32  # YOLOv12's
PAPER = "YOLOv12: Attention-Centric Real-Time Object Detectors, arXiv 2502.12524"


@register("AreaAttention", "AAttn", channels=rules.same_width, kind="attention", paper=PAPER)
class AreaAttention(nn.Module):
    """proj(softmax(q kᵀ / √d) v + conv7x7(v)) inside each of ``area`` stripes of rows (section 3.2 of the paper).

    The published code takes maps whose pixels ``area`` divides. Here the rows are padded to a multiple and the padding is masked out; on a
    map whose height ``area`` divides both are the same. Parameter names are YOLOv12's.

    Args:
        dim: channels in and out.
        num_heads: number of heads; None for about 32 channels a head.
        area: number of stripes; 1 attends to the whole map.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int | None = None, area: int = 1) -> None:
        super().__init__()
        if num_heads is None:
            num_heads = divisor_up_to(dim, max(1, dim // HEAD_CHANNELS))
        if dim % num_heads:
            raise ValueError(f"area attention: {num_heads} heads should divide {dim} channels")
        self.heads, self.area = num_heads, area
        self.qkv = Conv(dim, 3 * dim, act=False)
        self.proj = Conv(dim, dim, act=False)
        self.pe = Conv(dim, dim, 7, g=dim, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        per_head = self.qkv(x).unflatten(1, (self.heads, -1)).chunk(3, 2)  # heads hold query, key and value side by side
        query, key, value = (part.reshape(x.shape) for part in per_head)
        attended = attend(query, key, value, heads=self.heads) if self.area == 1 else self._in_stripes(query, key, value)
        return self.proj(attended + self.pe(value))

    def _in_stripes(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention inside each stripe: three (B, C, H, W) -> (B, C, H, W)."""
        batch, _, height, width = query.shape
        q, k, v = (self._stripes(part) for part in (query, key, value))
        padding = self._stripes(torch.ones_like(query[:, : self.heads])) - 1  # 0 inside the map, -1 on padding: (B area, heads, N, 1)
        mask = (100.0 * padding).transpose(2, 3).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B area, heads, N, d)
        grid = out.unflatten(2, (-1, width)).unflatten(0, (batch, self.area))  # (B, area, heads, rows, W, d)
        return grid.permute(0, 2, 5, 1, 3, 4).flatten(3, 4).flatten(1, 2)[:, :, :height]

    def _stripes(self, x: Tensor) -> Tensor:
        """(B, heads d, H, W) -> (B area, heads, pixels, d)."""
        rows = pad_to_multiple(x, self.area, 1).unflatten(2, (self.area, -1)).unflatten(1, (self.heads, -1))  # (B, heads, d, area, rows, W)
        return rows.permute(0, 3, 1, 4, 5, 2).flatten(3, 4).flatten(0, 1).contiguous()


class _AreaBlock(nn.Module):
    """x + area attention(x), then x + MLP(x)."""

    def __init__(self, channels: int, mlp_ratio: float, area: int) -> None:
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.attn = AreaAttention(channels, None, area)
        self.mlp = nn.Sequential(Conv(channels, hidden), Conv(hidden, channels, act=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


@register("A2C2f", channels=rules.out_width_repeated, kind="attention", paper=PAPER)
class A2C2f(nn.Module):
    """Residual efficient layer aggregation (section 3.3 of the paper): a chain of stages, each of two area-attention blocks, concatenated.

    Args:
        c1: input channels.
        c2: output channels.
        n: number of stages.
        a2: area attention; False for CSP stages of convolutions.
        area: stripes of each attention.
        residual: add the input, with the output scaled by γ (0.01 at first); only where ``c1 == c2`` and ``a2``.
        mlp_ratio: hidden width of the MLPs.
        e: inner width, in multiples of ``c2``.
        g: groups of the CSP stages.
        shortcut: residuals in the CSP stages.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        n: int = 1,
        a2: bool = True,
        area: int = 1,
        residual: bool = False,
        mlp_ratio: float = 2.0,
        e: float = 0.5,
        g: int = 1,
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv((1 + n) * hidden, c2)
        self.gamma = nn.Parameter(torch.full((c2,), 0.01)) if a2 and residual and c1 == c2 else None
        self.m = nn.ModuleList(
            nn.Sequential(*(_AreaBlock(hidden, mlp_ratio, area) for _ in range(2))) if a2 else CSP(hidden, hidden, 2, shortcut, g)
            for _ in range(n)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, H, W)."""
        maps = [self.cv1(x)]
        for stage in self.m:
            maps.append(stage(maps[-1]))
        out = self.cv2(torch.cat(maps, 1))
        return out if self.gamma is None else x + per_channel(self.gamma) * out
