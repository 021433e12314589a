"""Non-local blocks: every position sums over all positions, in the four pairwise forms of the paper, none with an N x N matrix.

Non-local Neural Networks, arXiv 1711.07971.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import full_precision, fused_attention, take_rows
from models.layers.explained import PlaneMap, Query, View, query_weights
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Non-local Neural Networks, arXiv 1711.07971"
MODES = ("gaussian", "embedded", "dot", "concatenate")
PREFIX_BLOCK = 64  # positions that one triangular product sums up


@register("NLBlockND", "NonLocal", channels=rules.same_width, kind="attention", paper=PAPER)
class NLBlockND(nn.Module):
    """z = W_z(y) + x with y_i = Σ_j f(x_i, x_j) g(x_j) / C(x) (equations 1 and 6 of the paper), over 1, 2 or 3 dimensions.

    With θ, φ and g 1x1 convolutions and N positions, f and C are
    ``gaussian``: exp(x_iᵀ x_j), C the sum over j (equation 2);
    ``embedded``: exp(θ_iᵀ φ_j), C the sum over j (equation 3), that is softmax attention without a scale;
    ``dot``: θ_iᵀ φ_j, C = N (equation 4);
    ``concatenate``: ReLU(w [θ_i, φ_j] + b), C = N (equation 5).

    All forms are exact. The first two run in fused attention; ``dot`` takes the product φᵀg first and is linear in N; ``concatenate`` is
    Σ_j ReLU(a_i + b_j) g_j, which sorting and prefix sums give in O(N log N).

    Differences from the published code: ``dimension`` is 2 at first (there 3), and inputs in any memory layout work. The block is the
    identity at its own initialisation.

    Args:
        in_channels: channels in and out.
        inter_channels: channels of θ, φ and g; None for half.
        mode: one of the four forms.
        dimension: 1 for (B, C, L), 2 for (B, C, H, W), 3 for (B, C, T, H, W).
        bn_layer: a batch norm at the end, at zero; else W_z itself is zero at first.
        sub_sample: the sum runs over maxima of φ and g in 2 x 2 pixels (in pairs over 1 dimension; over 3, of each frame): a quarter of the
            cost (section 3.3 of the paper). An odd last row or column stands for itself.

    Raises:
        ValueError: an unknown mode or dimension; from ``forward``, an input of another dimension.
    """

    def __init__(
        self,
        in_channels: int,
        inter_channels: int | None = None,
        mode: str = "embedded",
        dimension: int = 2,
        bn_layer: bool = True,
        sub_sample: bool = False,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        if dimension not in (1, 2, 3):
            raise ValueError(f"dimension {dimension} is not 1, 2 or 3")
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimension - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimension - 1]
        inter = inter_channels or max(in_channels // 2, 1)
        self.mode, self.dimension, self.sub_sample = mode, dimension, sub_sample
        self.g = conv(in_channels, inter, 1)
        output = conv(inter, in_channels, 1)
        last = norm(in_channels) if bn_layer else output
        self.W_z = nn.Sequential(output, last) if bn_layer else output
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        if mode != "gaussian":
            self.theta = conv(in_channels, inter, 1)
            self.phi = conv(in_channels, inter, 1)
        if mode == "concatenate":
            self.W_f = nn.Sequential(nn.Conv2d(2 * inter, 1, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *space) -> (B, C, *space)."""
        if x.dim() != self.dimension + 2:
            raise ValueError(f"a non-local block over {self.dimension} dimensions takes {self.dimension + 2} axes, not {x.dim()} axes")
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C), no copy
        value = self._summed(project(tokens, self.g), x)
        if self.mode == "gaussian":
            dense = tokens.contiguous()
            y = _softmax_sum(dense, self._summed(dense, x), value)
        else:
            pair = {"embedded": _softmax_sum, "dot": self._dot, "concatenate": self._concatenate}[self.mode]
            y = pair(project(tokens, self.theta), self._summed(project(tokens, self.phi), x), value)
        y = y.transpose(1, 2)  # (B, inter, N)
        y = y.reshape(x.shape[0], y.shape[1], *x.shape[2:])
        if self.mode != "dot":
            return self.W_z(y.to(value.dtype)) + x
        with full_precision(x):  # a product of three features, which float16 may not hold before the batch norm
            return self.W_z(y.to(self.g.weight.dtype)).to(value.dtype) + x

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """The affinities of one pixel to all others; of maps only."""
        if self.dimension != 2:
            return ()
        step = 2 if self.sub_sample else 1
        rows, columns = (-(-side // step) for side in x.shape[2:])
        signed = self.mode == "dot"
        values = self.weights_of(x, query).unflatten(0, (rows, columns))
        reach = (step * rows / x.shape[2], step * columns / x.shape[3])
        return (PlaneMap(f"affinities of the query ({self.mode})", values, at_query=True, signed=signed, reach=reach),)

    def weights_of(self, x: Tensor, query: Query) -> Tensor:
        """f(x_i, x_j) / C(x) of one pixel i and all j: (1, C, H, W) -> (M,), in float32 at least."""
        tokens = x.flatten(2).transpose(1, 2)  # (1, N, C)
        plain = self.mode == "gaussian"
        theta, phi = (tokens, tokens) if plain else (project(tokens, self.theta), project(tokens, self.phi))
        wide = torch.promote_types(x.dtype, torch.float32)
        one, keys = theta[0, query.cell_number(x.shape[2], x.shape[3])].to(wide), self._summed(phi.contiguous(), x)[0].to(wide)
        if self.mode in ("gaussian", "embedded"):
            return query_weights(one[None], keys[None], scale=1.0)[0]
        if self.mode == "dot":
            return keys @ one / len(keys)
        layer: Any = self.W_f[0]
        of_theta, of_phi = layer.weight.flatten().to(wide).chunk(2)
        return F.relu(one @ of_theta + layer.bias.to(wide) + keys @ of_phi) / len(keys)

    def _summed(self, tokens: Tensor, x: Tensor) -> Tensor:
        """The positions that are summed over: (B, N, C) -> (B, M, C), M = N without ``sub_sample``."""
        if not self.sub_sample:
            return tokens
        maps = tokens.transpose(1, 2).reshape(x.shape[0], tokens.shape[2], *x.shape[2:])
        for dim in range(2, x.dim())[-2:]:
            maps = pair_max(maps, dim)
        return maps.flatten(2).transpose(1, 2).contiguous()

    def _dot(self, theta: Tensor, phi: Tensor, value: Tensor) -> Tensor:
        """As ``dot_sum``, in float32 at least."""
        wide = torch.promote_types(value.dtype, torch.float32)
        with full_precision(value):
            return dot_sum(theta.to(wide), phi.to(wide), value.to(wide))

    def _concatenate(self, theta: Tensor, phi: Tensor, value: Tensor) -> Tensor:
        """Σ_j ReLU(a_i + b_j) g_j / M with w [θ_i, φ_j] + b = a_i + b_j, in float32.

        (B, N, C), (B, M, C), (B, M, C) -> (B, N, C).
        """
        with full_precision(value):
            layer: Any = self.W_f[0]
            # matrices of one column, not vectors: onnxruntime 1.32 gives another product for a transposed map and a vector
            of_theta, of_phi = layer.weight.reshape(-1, 1).float().chunk(2)
            a = (theta.float() @ of_theta).squeeze(2) + layer.bias.float()  # (B, N)
            b = (phi.float() @ of_phi).squeeze(2)  # (B, M)
            return pairwise_relu_sum(a, b, value.float()) / value.shape[1]


def project(tokens: Tensor, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
    """A 1x1 convolution of positions in any layout, directly into the layout that attention uses: (B, N, C) -> (B, N, inter)."""
    assert conv.bias is not None
    weight = conv.weight.flatten(1).t().expand(tokens.shape[0], -1, -1)
    return torch.baddbmm(conv.bias, tokens, weight)


def pair_max(x: Tensor, dim: int) -> Tensor:
    """The maximum of each pair along ``dim``: length n becomes ceil(n / 2); equal maxima share the gradient.

    By index: pooling has no deterministic gradient on CUDA, and a traced graph follows the size.
    """
    place = torch.arange(x.shape[dim], device=x.device)
    first, last = place[::2], place[-1:]
    return torch.maximum(x.index_select(dim, first), x.index_select(dim, torch.minimum(first + 1, last)))


def dot_sum(theta: Tensor, phi: Tensor, value: Tensor) -> Tensor:
    """θ (φᵀ g / M): (B, N, C), (B, M, C), (B, M, C) -> (B, N, C).

    Each factor takes its half of 1 / M, so that half precision holds the sum.
    """
    share = phi.shape[1] ** -0.5
    return theta @ ((phi * share).transpose(1, 2) @ (value * share))


def _softmax_sum(theta: Tensor, phi: Tensor, value: Tensor) -> Tensor:
    """Softmax attention without a scale: (B, N, C), (B, M, C), (B, M, V) -> (B, N, V)."""
    query = theta.unsqueeze(1)
    key = query if phi is theta else phi.unsqueeze(1)
    return fused_attention(query, key, value.unsqueeze(1), scale=1.0).squeeze(1)


def pairwise_relu_sum(a: Tensor, b: Tensor, value: Tensor) -> Tensor:
    """Σ_j ReLU(a_i + b_j) v_j for all i, without the N x M pairs.

    Only j with b_j > -a_i count, and over those the sum is a_i Σ v_j + Σ b_j v_j: two prefix sums in descending order of b, read off at
    the place of -a_i. One sort of all b and -a together gives that place.

    Args:
        a: (B, N).
        b: (B, M).
        value: (B, M, C).

    Returns:
        (B, N, C).
    """
    queries, count = a.shape[1], b.shape[1]
    order = torch.cat([b, -a], dim=1).detach().argsort(dim=1, descending=True)  # (B, M + N) of entries: b first, then -a
    place = order.argsort(dim=1)[:, count:]  # (B, N): the place of each -a
    terms = F.pad(torch.cat([value, b.unsqueeze(2) * value], dim=2), (0, 0, 0, queries))  # zeros for -a: (B, M + N, 2 C)
    plain, weighted = take_rows(prefix_sum(take_rows(terms, order)), place).chunk(2, dim=2)
    return a.unsqueeze(2) * plain + weighted


def prefix_sum(x: Tensor) -> Tensor:
    """Inclusive prefix sums along dimension 1 of (B, N, C), as products with triangular matrices: within blocks, then over the blocks.

    A cumulative sum has no deterministic kernel on every device; this has, and it rounds less.
    """
    batch, count, channels = x.shape
    padded = F.pad(x, (0, 0, 0, (PREFIX_BLOCK - count % PREFIX_BLOCK) % PREFIX_BLOCK))
    blocks = padded.reshape(batch, -1, PREFIX_BLOCK, channels)
    within = _lower_triangle(blocks[0, 0, :, 0]) @ blocks  # (B, blocks, PREFIX_BLOCK, C)
    totals = within[:, :, -1]  # (B, blocks, C)
    before = _lower_triangle(totals[0, :, 0]) @ totals - totals
    return (within + before.unsqueeze(2)).reshape(batch, -1, channels)[:, :count]


def _lower_triangle(like: Tensor) -> Tensor:
    """(n, n) of ones on and below the diagonal, for ``like`` of (n,)."""
    place = torch.arange(like.shape[0], device=like.device)
    return (place.unsqueeze(1) >= place).to(like.dtype)
