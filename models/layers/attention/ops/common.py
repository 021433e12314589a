"""Shared by the attention modules: pointwise layers on (B, C, H, W) maps with the parameters of a published Linear, windows, attention."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.rows import attention_by_rows, better_by_rows


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


class NamedLayerNorm(nn.Module):
    """:class:`ChannelLayerNorm` under the key ``norm`` that some published modules give it."""

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.norm(x)


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


def recorded() -> bool:
    """Whether an exporter, a compiler or torch.func traces the call: these need plain operators and plan memory themselves."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def full_precision(x: Tensor) -> AbstractContextManager:
    """A context that disables autocast on ``x``'s device; a null context for meta tensors, which autocast does not affect."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def pad_to_multiple(x: Tensor, rows: int, columns: int, *, value: float = 0.0) -> Tensor:
    """Zeros, or ``value``, at the bottom and the right, up to a height that ``rows`` divides and a width that ``columns`` divides.

    (B, C, H, W) -> (B, C, H', W'). While a graph is being traced the padding is always recorded, because another size may need it.
    """
    height, width = x.shape[-2:]
    below, right = (rows - height % rows) % rows, (columns - width % columns) % columns
    if not torch.jit.is_tracing() and below == 0 and right == 0:
        return x
    return F.pad(x, (0, right, 0, below), value=value)


def to_windows(x: Tensor, height: int, width: int) -> Tensor:
    """Cuts a map into windows of ``height`` x ``width`` pixels that fill it: (B, C, H, W) -> (B, windows, pixels, C), row-major."""
    batch, channels, map_height, map_width = x.shape
    grid = x.permute(0, 2, 3, 1).reshape(batch, map_height // height, height, map_width // width, width, channels)
    return grid.transpose(2, 3).reshape(batch, -1, height * width, channels)


def from_windows(windows: Tensor, height: int, width: int, *, columns: int) -> Tensor:
    """The inverse of to_windows: (B, windows, pixels, C), ``columns`` windows in a row -> (B, C, H, W)."""
    batch, count, _, channels = windows.shape
    rows = count // columns
    grid = windows.reshape(batch, rows, columns, height, width, channels).transpose(2, 3)
    return grid.reshape(batch, rows * height, columns * width, channels).permute(0, 3, 1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, *, heads: int = 1, scale: float | None = None, dropout: float = 0.0) -> Tensor:
    """Softmax attention between the positions of maps, without a matrix of positions by positions.

    Heads are contiguous groups of channels.

    Args:
        query: (B, heads * d, *space).
        key: (B, heads * d, *space of the keys).
        value: (B, heads * v, *space of the keys).
        heads: number of heads.
        scale: factor of the logits; None for 1 / sqrt(d).
        dropout: probability with which a weight is dropped.

    Returns:
        (B, heads * v, *space).
    """
    q, k, v = (_heads_first(x, heads) for x in (query, key, value))
    out = fused_attention(q, k, v, scale=q.shape[-1] ** -0.5 if scale is None else scale, dropout=dropout)
    return out.transpose(2, 3).reshape(query.shape[0], value.shape[1], *query.shape[2:])


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention for a value that may be narrower or wider than query and key.

    (B, heads, N, d), (B, heads, M, d), (B, heads, M, v) -> (B, heads, N, v). The fused kernels need one width, so narrower tensors are
    padded with zeros, which do not change a product; the value's are cut off again. Large maps on a CPU need no padding.
    """
    if dropout == 0.0 and not recorded() and better_by_rows(query, key, value):
        return attention_by_rows(query, key, value, scale=scale)
    narrow = value.shape[-1]
    width = max(query.shape[-1], narrow)
    query, key, value = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)[..., :narrow]


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of each batch entry's table: (B, P, D), (B, K) -> (B, K, D).

    An embedding look-up does it, because its backward pass sums the rows in a fixed order on every device, without atomic additions, and
    builds nothing larger than the table's own gradient.
    """
    batch, rows, width = table.shape
    first = torch.arange(batch, device=index.device).unsqueeze(1) * rows
    return F.embedding(index + first, table.reshape(batch * rows, width))


def resize_matrix(size: int, target: int, like: Tensor) -> Tensor:
    """The matrix (target, size) of linear interpolation that keeps the middle and the ends; the identity where the sizes agree.

    A product with it resizes a table of positions deterministically, and for sizes that a traced graph does not know yet.
    """
    place = torch.arange(target, device=like.device, dtype=torch.float32)
    last = place[-1:]
    scaled = (size - 1) / 2 + (place - last / 2) * ((size - 1) / last.clamp(min=1))
    distance = scaled.unsqueeze(1) - torch.arange(size, device=like.device, dtype=torch.float32)
    return (1 - distance.abs()).clamp(min=0).to(like.dtype)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """(B, heads * d, *space) -> (B, heads, N, d), contiguous."""
    return x.flatten(2).unflatten(1, (heads, x.shape[1] // heads)).transpose(2, 3).contiguous()
