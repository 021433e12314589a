"""Area attention: softmax attention inside equal runs of the map's pixels, and the aggregation block built on it.

YOLOv12: Attention-Centric Real-Time Object Detectors, arXiv 2502.12524.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import attend, pad_to_multiple, per_channel
from models.layers.attention.ops.shared import divisor_up_to
from models.layers.c3k import C3k
from models.layers.conv import Conv
from models.layers.explained import Query, View, head_maps, query_weights, split_heads
from models.spec import channel_rules as rules
from models.spec.registry import register

HEAD_CHANNELS = 32  # YOLOv12's
POSITION_KERNEL = 7
INIT_STD = 0.02  # of a block's convolutions, of a normal distribution cut off at two of it
OUT_OF_REACH = -1e4  # added to the logits of padding: its weights are 0, and float16 holds it
TURBO_POSITION_KERNEL = 5  # of the later release, which its authors call turbo; YOLOv13 has it too
RESIDUAL_SCALES, RESIDUAL_MLP_RATIO, TURBO_RESIDUAL_MLP_RATIO = ("l", "x"), 1.2, 1.5
PAPER = "YOLOv12: Attention-Centric Real-Time Object Detectors, arXiv 2502.12524"


@register("AreaAttention", "AAttn", channels=rules.same_width, kind="attention", paper=PAPER)
class AreaAttention(nn.Module):
    """proj(softmax(q kᵀ / √d) v + conv7x7(v)) inside each of ``area`` equal runs of pixels, row by row (section 3.2 of the paper).

    Where ``area`` divides the height, the runs are stripes of rows. The published code takes maps whose pixels ``area`` divides; here the
    last runs are padded to the length of the others, and the padding is masked out. No matrix of pixels by pixels is kept. Parameter names
    are YOLOv12's.

    Args:
        dim: channels in and out.
        num_heads: number of heads; None for about 32 channels a head.
        area: number of runs; 1 attends to the whole map.
        position_kernel: kernel of the convolution of the values, odd (7; 5 in the release that its authors call turbo).

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or ``area`` is below 1.
    """

    def __init__(self, dim: int, num_heads: int | None = None, area: int = 1, position_kernel: int = POSITION_KERNEL) -> None:
        super().__init__()
        if area < 1:
            raise ValueError(f"area attention: area should be at least 1, not {area}")
        if num_heads is None:
            num_heads = divisor_up_to(dim, max(1, dim // HEAD_CHANNELS))
        if dim % num_heads:
            raise ValueError(f"area attention: {num_heads} heads should divide {dim} channels")
        self.heads, self.area = num_heads, area
        self.qkv = Conv(dim, 3 * dim, act=False)
        self.proj = Conv(dim, dim, act=False)
        self.pe = Conv(dim, dim, position_kernel, g=dim, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        query, key, value = self._projected(x)
        attended = attend(query, key, value, heads=self.heads) if self.area == 1 else self._in_areas(query, key, value)
        return self.proj(attended + self.pe(value))

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """What one pixel attends to; outside its area nothing."""
        weights = self.weights_of(x, query)
        what = f"attention of the query in its area, one of {self.area}" if self.area > 1 else "attention of the query"
        return head_maps(weights, (x.shape[2], x.shape[3]), what=what)

    def weights_of(self, x: Tensor, query: Query) -> Tensor:
        """What one pixel gives each pixel's value: (1, C, H, W) -> (heads, H W), zero outside its area."""
        queries, keys, _ = (split_heads(part, self.heads) for part in self._projected(x))
        pixels, place = keys.shape[1], query.cell_number(x.shape[2], x.shape[3])
        length = -(-pixels // self.area)
        start = place // length * length
        weights = queries.new_zeros(self.heads, pixels)
        inside = keys[:, start : start + length]
        weights[:, start : start + length] = query_weights(queries[:, place], inside, scale=queries.shape[2] ** -0.5).to(weights.dtype)
        return weights

    def _projected(self, x: Tensor) -> list[Tensor]:
        """Query, key and value, heads as contiguous groups of channels: each (B, C, H, W)."""
        per_head = self.qkv(x).unflatten(1, (self.heads, -1)).chunk(3, 2)  # heads hold query, key and value side by side
        return [part.reshape(x.shape) for part in per_head]

    def _in_areas(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention inside each area: three (B, C, H, W) -> (B, C, H, W)."""
        batch, pixels = query.shape[0], query.shape[2] * query.shape[3]
        q, k, v = (self._areas(part) for part in (query, key, value))
        is_padded = torch.jit.is_tracing() or pixels % self.area != 0
        mask = self._padding_mask(query) if is_padded else None  # without one, torch has faster kernels
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B area, heads, N, d)
        runs = out.unflatten(0, (batch, self.area)).permute(0, 2, 4, 1, 3)  # (B, heads, d, area, N)
        return runs.flatten(3)[..., :pixels].reshape(query.shape)

    def _padding_mask(self, x: Tensor) -> Tensor:
        """What is added to the logits, 0 for pixels of the map: (B area, heads, 1, N)."""
        inside = self._areas(torch.ones_like(x[:, : self.heads]))
        return (OUT_OF_REACH * (1 - inside)).transpose(2, 3)

    def _areas(self, x: Tensor) -> Tensor:
        """(B, heads d, H, W) -> (B area, heads, N, d), N the pixels of an area."""
        runs = pad_to_multiple(x.flatten(2).unsqueeze(2), 1, self.area).squeeze(2)  # (B, C, area N)
        split = runs.unflatten(2, (self.area, -1)).unflatten(1, (self.heads, -1))  # (B, heads, d, area, N)
        return split.permute(0, 3, 1, 4, 2).flatten(0, 1).contiguous()


@register("ABlock", channels=rules.same_width, kind="attention", paper=PAPER)
class ABlock(nn.Module):
    """x + area attention(x), then x + MLP(x); parameter names are YOLOv12's.

    Args:
        dim: channels in and out.
        num_heads: number of heads; None for about 32 channels a head.
        mlp_ratio: hidden width of the MLP, in multiples of ``dim``.
        area: runs of pixels, as :class:`AreaAttention` has them.
        position_kernel: as there.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self, dim: int, num_heads: int | None = None, mlp_ratio: float = 1.2, area: int = 1, position_kernel: int = POSITION_KERNEL
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.attn = AreaAttention(dim, num_heads, area, position_kernel)
        self.mlp = nn.Sequential(Conv(dim, hidden), Conv(hidden, dim, act=False))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.attn(x)
        return x + self.mlp(x)


@register("A2C2f", channels=rules.out_width_repeated, kind="attention", paper=PAPER)
class A2C2f(nn.Module):
    """Residual efficient layer aggregation (section 3.3 of the paper): a chain of stages, each of two area-attention blocks, concatenated.

    Args:
        c1: input channels.
        c2: output channels.
        n: number of stages.
        a2: area attention; False for stages of convolutions, :class:`C3k`.
        area: runs of pixels of each attention; has no effect without ``a2`` (published rows then have -1).
        residual: add the input, with the output scaled by γ (0.01 at first); only where ``c1 == c2`` and ``a2``. At scales l and x of a
            file with scales it is True unless a row says otherwise, and ``mlp_ratio`` 1.2 (1.5 with ``turbo``).
        mlp_ratio: hidden width of the MLPs, in multiples of the inner width.
        e: inner width, in multiples of ``c2``.
        g: groups of the CSP stages.
        shortcut: residuals in the CSP stages.
        position_kernel: as :class:`AreaAttention` has it; None for 7, or 5 with ``turbo``.
        turbo: the numbers of the later release, as YOLOv13 has them.
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
        position_kernel: int | None = None,
        turbo: bool = False,
    ) -> None:
        super().__init__()
        hidden = int(c2 * e)
        if position_kernel is None:
            position_kernel = TURBO_POSITION_KERNEL if turbo else POSITION_KERNEL
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv((1 + n) * hidden, c2)
        self.gamma = nn.Parameter(torch.full((c2,), 0.01)) if a2 and residual and c1 == c2 else None
        self.m = nn.ModuleList(
            nn.Sequential(*(ABlock(hidden, None, mlp_ratio, area, position_kernel) for _ in range(2)))
            if a2
            else C3k(hidden, hidden, 2, shortcut, g)
            for _ in range(n)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, H, W)."""
        maps = [self.cv1(x)]
        for stage in self.m:
            maps.append(stage(maps[-1]))
        out = self.cv2(torch.cat(maps, 1))
        return out if self.gamma is None else x + per_channel(self.gamma) * out

    @classmethod
    def row_options(cls, placed: Mapping[str, Any], scale: str) -> dict[str, Any]:
        """The residual form at the largest scales: published files rely on it."""
        ratio = TURBO_RESIDUAL_MLP_RATIO if placed.get("turbo") else RESIDUAL_MLP_RATIO
        form = {"residual": True, "mlp_ratio": ratio} if scale in RESIDUAL_SCALES else {}
        return {name: value for name, value in form.items() if name not in placed}
