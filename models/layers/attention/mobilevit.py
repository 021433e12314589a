"""MobileViT: a transformer between pixels at the same position in their patches, inside a convolutional block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLayerNorm, ChannelLinear, pad_to_multiple
from models.layers.attention.ops.shared import divisor_up_to
from models.layers.conv import Conv
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer, arXiv 2110.02178"
HEAD_CHANNELS = 32


@register("MobileViTAttention", channels=rules.same_width, kind="attention", paper=PAPER)
class MobileViTAttention(nn.Module):
    """conv([x, fold(transformer(unfold(local(x))))]) (section 3.1 and figure 1b of the paper).

    A pixel attends to the pixels at its position in all other patches. Maps are padded to whole patches and cropped; padding is masked out.

    Args:
        in_channel: channels in and out.
        dim: width of the transformer; None for ``in_channel``.
        depth: number of transformer layers.
        patch_size: side of a patch (px).
        mlp_ratio: hidden width of the MLPs, in multiples of ``dim``.
    """

    def __init__(self, in_channel: int, dim: int | None = None, depth: int = 2, patch_size: int = 2, mlp_ratio: float = 2.0) -> None:
        super().__init__()
        dim = dim or in_channel
        self.patch = patch_size
        self.local = nn.Sequential(Conv(in_channel, in_channel, 3), nn.Conv2d(in_channel, dim, 1, bias=False))
        self.layers = nn.ModuleList(_Layer(dim, int(dim * mlp_ratio)) for _ in range(depth))
        self.norm = ChannelLayerNorm(dim)
        self.out = Conv(dim, in_channel)
        self.fuse = Conv(2 * in_channel, in_channel, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        local = pad_to_multiple(self.local(x), self.patch, self.patch)
        tokens = self._unfold(local)  # (B p², dim, 1, patches)
        mask = self._unfold(pad_to_multiple(torch.ones_like(x[:, :1]), self.patch, self.patch))
        mask = (mask - 1) * 100.0  # 0 for pixels of the map, -100 for padding: (B p², 1, 1, patches)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        context = self._fold(self.norm(tokens), local)[:, :, :height, :width]
        return self.fuse(torch.cat((x, self.out(context)), 1))

    def _unfold(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B p², C, 1, patches): pixels with one place in their patches are one image."""
        grid = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # (B, C, h, p, w, p)
        return grid.permute(0, 3, 5, 1, 2, 4).flatten(4, 5).flatten(0, 2).unsqueeze(2)

    def _fold(self, tokens: Tensor, like: Tensor) -> Tensor:
        """The inverse of _unfold for a map as high and wide as ``like``."""
        batch, _, height, width = like.shape
        shape = (batch, self.patch, self.patch, tokens.shape[1], height // self.patch, width // self.patch)
        return tokens.reshape(shape).permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height, width)


class _Layer(nn.Module):
    """A pre-norm transformer layer on (B, C, 1, N)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.heads = divisor_up_to(channels, max(1, channels // HEAD_CHANNELS))
        self.norm1 = ChannelLayerNorm(channels)
        self.qkv = ChannelLinear(channels, 3 * channels)
        self.proj = ChannelLinear(channels, channels)
        self.norm2 = ChannelLayerNorm(channels)
        self.mlp = nn.Sequential(ChannelLinear(channels, hidden), nn.SiLU(), ChannelLinear(hidden, channels))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).squeeze(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4)  # (B, 3, heads, N, d)
        query, key, value = (part.contiguous() for part in qkv.unbind(1))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype))
        x = x + self.proj(out.transpose(2, 3).flatten(1, 2).unsqueeze(2))
        return x + self.mlp(self.norm2(x))
