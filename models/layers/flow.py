"""A normalizing flow of points in the plane, which pose heads learn their errors' distribution with.

Density estimation using Real NVP, arXiv 1605.08803; as used in Human Pose Regression with Residual Log-likelihood Estimation,
arXiv 2107.11291, section 3.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WIDTH = 64  # of the hidden layers
COUPLINGS = 6
FIRST_GAIN = 0.01  # of the weights at first: the flow begins close to the identity


class RealNVP(nn.Module):
    """Affine couplings from points to a standard normal distribution; each moves one coordinate by what the other says (equation 4).

    ``loc`` and ``cov`` are mean and covariance of that distribution, kept because the published checkpoints have them.
    """

    loc: Tensor
    cov: Tensor
    mask: Tensor  # (couplings, 2), 1 for the coordinate that stays

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(2))
        self.register_buffer("cov", torch.eye(2))
        self.register_buffer("mask", torch.tensor([[0, 1], [1, 0]] * (COUPLINGS // 2), dtype=torch.float32))
        self.s = nn.ModuleList(_network(nn.Tanh()) for _ in range(COUPLINGS))
        self.t = nn.ModuleList(_network() for _ in range(COUPLINGS))

    def forward(self, points: Tensor) -> Tensor:
        """Points (n, 2) to the logarithms (n,) of their densities, by the change of variables (equation 2)."""
        log_volume = points.new_zeros(len(points))
        for mask, scale, shift in zip(self.mask.flip(0), reversed(self.s), reversed(self.t)):
            kept = mask * points
            log_scale = scale(kept) * (1 - mask)
            points = (1 - mask) * (points - shift(kept)) * torch.exp(-log_scale) + kept
            log_volume = log_volume - log_scale.sum(dim=1)
        return log_volume - points.square().sum(dim=1) / 2 - math.log(2 * math.pi)


def _network(*last: nn.Module) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(2, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2), *last)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gain=FIRST_GAIN)
    return layers
