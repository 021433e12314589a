"""Small operations shared by attention modules: pooled gates, shuffles, bilinear sampling, pooling as a product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import full_precision, pad_to_multiple, recorded


class PooledBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that accepts a single value per channel in training (one image, pooled to one pixel).

    One value has no variance, so the running statistics are used; otherwise a plain batch norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        single = self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1
        if not single:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class GatedResidual(nn.Module):
    """x + proj_2(gate(GELU(proj_1(x)))): the block around the large-kernel gates of VAN, SegNeXt and later papers.

    Args:
        d_model: channels in and out.
        gate: same-width module; its keys become ``spatial_gating_unit.*``.
    """

    def __init__(self, d_model: int, gate: nn.Module) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(d_model, d_model, 1)
        self.spatial_gating_unit = gate
        self.proj_2 = nn.Conv2d(d_model, d_model, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x))))


def depthwise(channels: int, kernel: int | tuple[int, int], *, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A depth-wise convolution that keeps height and width; the kernel is odd."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    margin = (dilation * (height // 2), dilation * (width // 2))
    return nn.Conv2d(channels, channels, (height, width), padding=margin, dilation=dilation, groups=channels, bias=bias)


def conv_bn_relu(channels: int, out: int, kernel: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU at the same height and width."""
    return nn.Sequential(nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def global_mean(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1); a mean, because adaptive pooling has no deterministic gradient on CUDA."""
    return x.mean((2, 3), keepdim=True)


def global_max(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1); equal maxima share the gradient."""
    return x.amax((2, 3), keepdim=True)


def window_means(x: Tensor, size: int) -> Tensor:
    """The mean of each ``size`` x ``size`` window; windows cut by the border have the mean of their pixels.

    (B, C, H, W) -> (B, C, ceil(H / size), ceil(W / size)). An exported graph pads instead of using a pooling that rounds up: runtimes such
    as OpenVINO refuse a window that is larger than the map, or give an empty result for it.
    """
    if not recorded():
        return F.avg_pool2d(x, size, ceil_mode=True, count_include_pad=False)
    pixels = torch.ones_like(x[:1, :1], dtype=torch.float32)
    total, share = (F.avg_pool2d(pad_to_multiple(part, size, size), size) for part in (x, pixels))
    return (total / share).to(x.dtype)


def window_maxima(x: Tensor, size: int) -> Tensor:
    """The maximum of each ``size`` x ``size`` window; windows cut by the border have that of their pixels; see :func:`window_means`.

    (B, C, H, W) -> (B, C, ceil(H / size), ceil(W / size)).
    """
    if size == 1:
        return x
    if not recorded():
        return F.max_pool2d(x, size, ceil_mode=True)
    return F.max_pool2d(pad_to_multiple(x, size, size, value=-torch.inf), size)


def channel_extremes(x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Largest value and mean along ``dim``, which stays with length 1."""
    return x.amax(dim, keepdim=True), x.mean(dim, keepdim=True)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleaves ``groups`` contiguous groups of channels: (B, C, H, W) -> (B, C, H, W)."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).transpose(1, 2).reshape(x.shape)


def fold_groups(x: Tensor, groups: int) -> Tensor:
    """Groups of channels as images of their own: (B, G * c, H, W) -> (B * G, c, H, W)."""
    return x.reshape(-1, x.shape[1] // groups, *x.shape[2:])  # sizes by name, so that an ONNX graph follows them


def unfold_groups(x: Tensor, groups: int) -> Tensor:
    """The inverse of fold_groups: (B * G, c, H, W) -> (B, G * c, H, W)."""
    return x.reshape(-1, groups * x.shape[1], *x.shape[2:])


def divisor_up_to(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is not above ``limit`` (and at least 1)."""
    return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)


def adaptive_kernel(channels: int, *, gamma: float = 2.0, b: float = 1.0) -> int:
    """ECA's kernel over channels: the odd number at or above (log2 C + b) / gamma, rounded down first (arXiv 1910.03151, eq. 12)."""
    size = int(abs((channels.bit_length() - 1 + b) / gamma))
    return size if size % 2 else size + 1


def unit_line(count: int, like: Tensor) -> Tensor:
    """``count`` float32 numbers from -1 to 1 on ``like``'s device; a single one is -1."""
    steps = torch.arange(count, device=like.device, dtype=torch.float32)
    return steps * (2.0 / steps[-1].clamp(min=1.0)) - 1.0


def reflect_pad(x: Tensor, margin: int) -> Tensor:
    """Mirrors a map at its border pixels, as often as a small map needs: (B, C, H, W) -> (B, C, H + 2 margin, W + 2 margin).

    Selects by index, because reflection padding has no deterministic gradient on CUDA and no support for maps smaller than the margin.
    """
    for dim in (2, 3):
        size = x.shape[dim]
        last = torch.arange(size, device=x.device)[-1:]  # size - 1 as a tensor, so that a traced graph follows the size
        period = (2 * last).clamp(min=1)
        position = torch.arange(-margin, size + margin, device=x.device).abs() % period
        x = x.index_select(dim, torch.minimum(torch.minimum(position, period - position), last))
    return x


def sample_bilinear(x: Tensor, grid: Tensor, *, align_corners: bool = True) -> Tensor:
    """Values between pixels: (B, C, H, W) at (B, H', W', 2) in [-1, 1], x before y, zero outside -> (B, C, H', W').

    In float32 where the precision is lower. The fast kernel has no deterministic gradient on CUDA; in deterministic mode there, four
    gathers replace it.

    Args:
        align_corners: -1 and 1 are the middles of the first and the last pixel, else the edges of the map.
    """
    x, grid = (t if t.dtype == torch.float64 else t.float() for t in (x, grid))
    with full_precision(x):
        if x.is_cuda and torch.are_deterministic_algorithms_enabled():
            return _sample_by_gather(x, grid, align_corners=align_corners)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=align_corners)


def _sample_by_gather(x: Tensor, grid: Tensor, *, align_corners: bool) -> Tensor:
    height, width = x.shape[-2:]
    column, row = ((grid + 1) / 2).unbind(-1)  # (B, H', W')
    if align_corners:
        return gather_bilinear(x, row * (height - 1), column * (width - 1))
    return gather_bilinear(x, row * height - 0.5, column * width - 0.5)


def gather_bilinear(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Bilinear values at pixel positions, zero outside: (B, C, H, W) at (B, H', W') each -> (B, C, H', W')."""
    height, width = x.shape[-2:]
    top, left = row.floor(), column.floor()
    flat = x.flatten(2)
    total: Any = 0  # a tensor after the first corner
    for dy in (0, 1):
        for dx in (0, 1):
            y, z = top + dy, left + dx
            weight = (1 - (row - y).abs()) * (1 - (column - z).abs())  # (B, H', W')
            inside = (y >= 0) & (y <= height - 1) & (z >= 0) & (z <= width - 1)
            index = _clamp(y, height) * width + _clamp(z, width)
            picked = flat.gather(2, index.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1))
            total = total + picked * (weight * inside).flatten(1).unsqueeze(1)
    return total.unflatten(2, row.shape[1:])


def _clamp(index: Tensor, size: int) -> Tensor:
    last = torch.arange(size, device=index.device)[-1:]
    return torch.minimum(index.long().clamp(min=0), last)


def pooling_matrix(bins: int, size: int, like: Tensor) -> Tensor:
    """Adaptive average pooling of ``size`` values into ``bins`` as a matrix (bins, size), also where bins is the larger number.

    As a product it has a deterministic gradient and exports with a dynamic size.
    """
    start_of = torch.arange(bins, device=like.device).unsqueeze(1)
    position = torch.arange(size, device=like.device).unsqueeze(0)
    start = start_of * size // bins
    end = ((start_of + 1) * size + bins - 1) // bins  # rounded up
    inside = ((position >= start) & (position < end)).to(torch.float32)
    return (inside / inside.sum(1, keepdim=True)).to(like.dtype)
