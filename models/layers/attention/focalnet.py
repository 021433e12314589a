"""Focal modulation: a pixel's features are modulated by context gathered at growing radii, without attention weights.

Focal Modulation Networks, arXiv 2203.11926.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import ChannelLayerNorm, ChannelLinear, DropPath, Mlp, per_channel, weighted_sum
from models.layers.explained import PlaneMap, Query, View
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Focal Modulation Networks, arXiv 2203.11926"


@register("FocalModulation", channels=rules.same_width, kind="attention", paper=PAPER)
class FocalModulation(nn.Module):
    """Focal modulation on (B, C, H, W) maps (equations 4 to 7 of the paper).

    One projection ``f`` gives a query q, a context z⁰ and gates g. Level l = 1 … L gathers zˡ = GELU(depthwise(zˡ⁻¹)) with kernel
    ``focal_window + focal_factor (l - 1)``; level L + 1 is GELU of the map's mean. The output is proj(q · h(Σ gˡ zˡ)).

    Parameter names and shapes are the published ones (``f.weight`` and ``proj.weight`` are matrices). Unlike the published code it keeps no
    activation on the module, so that a model can be copied and saved after a training step, and it never leaves the channels-first
    layout. The rows of ``f`` are applied as three convolutions, because 2C + L + 1 output channels are an inefficient matrix size.

    Args:
        dim: channels in and out.
        focal_window: kernel of the first level, odd.
        focal_level: number of convolutional levels L.
        focal_factor: growth of the kernel from level to level, even.
        bias: whether ``f`` and ``h`` have a bias (``proj`` always has).
        proj_drop: dropout after ``proj``.
        use_postln_in_modulation: layer normalisation before ``proj``.
        normalize_modulator: divides the sum over the levels by L + 1.

    Raises:
        ValueError: a kernel would be even or not positive.
    """

    below_one = ("focal_factor",)  # options of which numbers below 1 mean something

    def __init__(
        self,
        dim: int,
        focal_window: int = 3,
        focal_level: int = 2,
        focal_factor: int = 2,
        bias: bool = True,
        proj_drop: float = 0.0,
        use_postln_in_modulation: bool = False,
        normalize_modulator: bool = False,
    ) -> None:
        super().__init__()
        kernels = [focal_window + focal_factor * level for level in range(focal_level)]
        if focal_level < 1 or any(k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(f"focal_window {focal_window} with focal_factor {focal_factor} gives kernels {kernels}; each must be odd")
        self.dim = dim
        self.levels = focal_level
        self.f = ChannelLinear(dim, 2 * dim + focal_level + 1, bias=bias)
        self.h = nn.Conv2d(dim, dim, 1, bias=bias)
        self.proj = ChannelLinear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, bias=False), nn.GELU()) for k in kernels
        )
        self.ln = ChannelLayerNorm(dim) if use_postln_in_modulation else nn.Identity()
        self.modulator_scale = 1.0 / (focal_level + 1) if normalize_modulator else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        query, context, gates = self._project(x)
        out = query * self._modulator(context, gates)
        return self.proj_drop(self.proj(self.ln(out)))

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """Where the gate of each level opens, which level is the strongest, and how large the modulator is."""
        _, context, gates = self._project(x)
        kernels = [cast(nn.Conv2d, cast(nn.Sequential, layer)[0]).kernel_size[0] for layer in self.focal_layers]
        reach = [1 + sum(k - 1 for k in kernels[: level + 1]) for level in range(self.levels)]
        names = [f"gate of level {level + 1} ({side}×{side} pixels)" for level, side in enumerate(reach)]
        views = [PlaneMap(name, gate, signed=True) for name, gate in zip([*names, "gate of the whole map"], gates[0])]
        return (*views, PlaneMap("norm of the modulator", self._modulator(context, gates)[0].norm(dim=0)))

    def _modulator(self, context: Tensor, gates: Tensor) -> Tensor:
        """What the query is multiplied with: (B, C, H, W), (B, L + 1, H, W) -> (B, C, H, W)."""
        contexts = []
        for gather in self.focal_layers:
            context = gather(context)
            contexts.append(context)
        contexts.append(F.gelu(context.mean((2, 3), keepdim=True)))  # (B, C, 1, 1)
        return self.h(weighted_sum(contexts, gates.split(1, dim=1)) * self.modulator_scale)  # type: ignore[no-any-return]

    def _project(self, x: Tensor) -> list[Tensor]:
        """Query (B, C, H, W), context (B, C, H, W) and gates (B, L + 1, H, W): the three groups of rows of ``f``."""
        sizes = (self.dim, self.dim, self.levels + 1)
        weights = self.f.weight[:, :, None, None].split(sizes)
        biases = (None, None, None) if self.f.bias is None else self.f.bias.split(sizes)
        return [F.conv2d(x, weight, bias) for weight, bias in zip(weights, biases)]


@register("FocalModulationBlock", "FocalNetBlock", channels=rules.same_width, kind="attention", paper=PAPER)
class FocalModulationBlock(nn.Module):
    """FocalNet's block: x + γ₁ · modulation(LN(x)), then x + γ₂ · MLP(LN(x)), on (B, C, H, W) maps.

    With ``use_postln`` the normalisations act on the branches' outputs instead. γ₁ and γ₂ exist only with ``use_layerscale``.

    Args:
        dim: channels in and out.
        mlp_ratio: hidden width of the MLP, in multiples of ``dim``.
        drop: dropout in the modulation's projection and in the MLP.
        drop_path: rate of stochastic depth.
        focal_level: number of convolutional levels.
        focal_window: kernel of the first level.
        use_layerscale: learn γ₁ and γ₂.
        layerscale_value: their start.
        use_postln: normalise after the branches.
        use_postln_in_modulation: see FocalModulation.
        normalize_modulator: see FocalModulation.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        *,
        drop: float = 0.0,
        drop_path: float = 0.0,
        focal_level: int = 2,
        focal_window: int = 3,
        use_layerscale: bool = False,
        layerscale_value: float = 1e-4,
        use_postln: bool = False,
        use_postln_in_modulation: bool = False,
        normalize_modulator: bool = False,
    ) -> None:
        super().__init__()
        self.use_postln = use_postln
        self.norm1 = ChannelLayerNorm(dim)
        self.modulation = FocalModulation(
            dim,
            focal_window,
            focal_level,
            proj_drop=drop,
            use_postln_in_modulation=use_postln_in_modulation,
            normalize_modulator=normalize_modulator,
        )
        self.norm2 = ChannelLayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)
        self.gamma_1 = nn.Parameter(torch.full((dim,), layerscale_value)) if use_layerscale else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), layerscale_value)) if use_layerscale else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self._branch(x, self.norm1, self.modulation, self.gamma_1)
        return x + self._branch(x, self.norm2, self.mlp, self.gamma_2)

    def _branch(self, x: Tensor, norm: nn.Module, layer: nn.Module, gamma: Tensor | None) -> Tensor:
        out = norm(layer(x)) if self.use_postln else layer(norm(x))
        return self.drop_path(out if gamma is None else per_channel(gamma) * out)
