"""Mixed local channel attention: ECA's convolution over channels, in a 5x5 grid of places and for the whole map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.shared import adaptive_kernel, global_mean, pooling_matrix
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Mixed local channel attention for object detection, Engineering Applications of Artificial Intelligence 123, 2023"


@register("MLCA", channels=rules.same_width, kind="attention", paper=PAPER)
class MLCA(nn.Module):
    """x · unpool(λ σ(conv(local)) + (1 - λ) σ(conv(global))) (figure 3 of the paper), local = mean in a grid of places.

    The convolution runs over the channels of one place at a time; other implementations concatenate the places, so that the last channel
    of one is adjacent to the first of the next. Pooling to the grid and back are products with two small matrices: any size, also below
    the grid.

    Args:
        in_size: channels in and out.
        local_size: places a side.
        local_weight: λ.
    """

    def __init__(self, in_size: int, local_size: int = 5, local_weight: float = 0.5) -> None:
        super().__init__()
        kernel = adaptive_kernel(in_size)
        self.local_size, self.local_weight = local_size, local_weight
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)
        self.conv_local = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        height, width = x.shape[-2:]
        size = self.local_size
        local = _resize(x, pooling_matrix(size, height, x), pooling_matrix(size, width, x))  # (B, C, s, s)
        of_all = _over_channels(self.conv, global_mean(local))
        gate = self.local_weight * _over_channels(self.conv_local, local) + (1 - self.local_weight) * of_all
        return x * _resize(gate, pooling_matrix(height, size, gate), pooling_matrix(width, size, gate))


def _over_channels(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """σ of a convolution along the channels of each place: (B, C, h, w) -> (B, C, h, w)."""
    height, width = x.shape[-2:]
    lines = x.permute(0, 2, 3, 1).flatten(0, 2).unsqueeze(1)  # (B h w, 1, C)
    return torch.sigmoid(conv(lines)).squeeze(1).unflatten(0, (-1, height, width)).permute(0, 3, 1, 2)


def _resize(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, C, H, W) with (h, H) and (w, W) -> (B, C, h, w)."""
    return rows @ x @ columns.transpose(0, 1)
