"""BiFormer as a backbone: a row a stage, and the whole network under its published parameter names.

BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810. Published sizes: tiny (64 128 256 512 channels, blocks
2 2 8 2), small (the same channels, 4 4 18 4), base (96 192 384 768, 4 4 18 4); top-k 1 4 16 and full attention in the last stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from models.backbones.whole import ends, listed_by_stage, ramp, rename_prefixes
from models.layers.attention.biformer import PAPER, BiFormerBlock
from models.spec import channel_rules as rules
from models.spec.registry import register


@register("BiFormerStage", channels=rules.out_width_repeated, kind="backbone", paper=PAPER)
class BiFormerStage(nn.Module):
    """One stage of BiFormer: strided convolutions, then ``n`` blocks.

    Args:
        c1: channels in.
        c2: channels out.
        n: blocks.
        topk: windows that a window attends to, -2 for full attention; published: 1, 4, 16, -2.
        stride: 4 for the first stage (two convolutions), else 2.
        head_dim: channels of a head of the routed attention.
        n_win: windows a side.
        mlp_ratio: hidden width of the MLPs.
        kv_downsample_mode: see BiLevelRoutingAttention.
        drop_path: rate of stochastic depth, one number or that of the first and the last block.
        block: further options of BiFormerBlock.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        n: int = 2,
        topk: int = 4,
        stride: int = 2,
        *,
        head_dim: int = 32,
        n_win: int = 7,
        mlp_ratio: float = 3.0,
        kv_downsample_mode: str = "identity",
        drop_path: float | Sequence[float] = 0.0,
        **block: Any,
    ) -> None:
        super().__init__()
        self.embed = _stem(c1, c2) if stride == 4 else _down(c1, c2)
        options = {"mlp_ratio": mlp_ratio, "kv_downsample_mode": kv_downsample_mode, "n_win": n_win, **block}
        self.blocks = _blocks(c2, max(c2 // head_dim, 1), topk, ramp(*ends(drop_path), n), options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, H / stride, W / stride), rounded up."""
        return self.blocks(self.embed(x))


@register("BiFormerBackbone", channels=listed_by_stage("yolov8-BiFormer-T.yaml"), kind="backbone", paper=PAPER)
class BiFormerBackbone(nn.Module):
    """All of BiFormer under its published parameter names; gives the maps of the four stages.

    Args:
        depth: blocks of each stage.
        embed_dim: channels of each stage.
        in_chans: channels of the image.
        num_classes: above 0, the classifier of published weights is built so that they load; the maps do not depend on it.
        mlp_ratios: hidden width of each stage's MLPs.
        n_win: windows a side.
        kv_downsample_mode: see BiLevelRoutingAttention.
        kv_per_wins: keys a side and window of each stage, for ``ada_avgpool``.
        topks: see BiFormerStage.
        side_dwconv: kernel of LePE.
        before_attn_dwconv: kernel of the positional convolution.
        layer_scale_init_value: see BiFormerBlock.
        qk_dims: channels of query and key of each stage; None for ``embed_dim``.
        head_dim: channels of a head of the routed attention.
        drop_path_rate: stochastic depth of the last block; it grows from 0.
        block: further options of BiFormerBlock.
    """

    def __init__(
        self,
        depth: Sequence[int] = (2, 2, 8, 2),
        embed_dim: Sequence[int] = (64, 128, 256, 512),
        *,
        in_chans: int = 3,
        num_classes: int = 0,
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        n_win: int = 7,
        kv_downsample_mode: str = "identity",
        kv_per_wins: Sequence[int] = (-1, -1, -1, -1),
        topks: Sequence[int] = (1, 4, 16, -2),
        side_dwconv: int = 5,
        before_attn_dwconv: int = 3,
        layer_scale_init_value: float = -1.0,
        qk_dims: Sequence[int] | None = None,
        head_dim: int = 32,
        drop_path_rate: float = 0.0,
        **block: Any,
    ) -> None:
        super().__init__()
        qk_dims = qk_dims or embed_dim
        self.downsample_layers = nn.ModuleList([_stem(in_chans, embed_dim[0]), *(_down(a, b) for a, b in pairwise(embed_dim))])
        rates = ramp(0.0, drop_path_rate, sum(depth))
        self.stages = nn.ModuleList()
        for i, width in enumerate(embed_dim):
            options = {
                "mlp_ratio": mlp_ratios[i],
                "kv_downsample_mode": kv_downsample_mode,
                "n_win": n_win,
                "qk_dim": qk_dims[i],
                "kv_per_win": kv_per_wins[i],
                "side_dwconv": side_dwconv,
                "before_attn_dwconv": before_attn_dwconv,
                "layer_scale_init_value": layer_scale_init_value,
                **block,
            }
            done = sum(depth[:i])
            self.stages.append(_blocks(width, qk_dims[i] // head_dim, topks[i], rates[done : done + depth[i]], options))
        if num_classes:
            self.norm = nn.BatchNorm2d(embed_dim[-1])
            self.head = nn.Linear(embed_dim[-1], num_classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> maps at strides 4, 8, 16 and 32."""
        maps = []
        for down, stage in zip(self.downsample_layers, self.stages):
            x = stage(down(x))
            maps.append(x)
        return maps


def rows_from_published(state: Mapping[str, Tensor], first_row: int = 0) -> dict[str, Tensor]:
    """Published weights under the names that BiFormerStage rows have in a network, ``model.<row>.…``; the classifier is left out.

    Args:
        state: the published state dict, keys as in BiFormerBackbone.
        first_row: row of the first stage.
    """
    stages = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("stages."))
    prefixes = {}
    for i in range(stages):
        prefixes[f"downsample_layers.{i}."] = f"model.{first_row + i}.embed."
        prefixes[f"stages.{i}."] = f"model.{first_row + i}.blocks."
    return rename_prefixes(state, prefixes)


def _stem(c1: int, c2: int) -> nn.Sequential:
    half = c2 // 2
    return nn.Sequential(nn.Conv2d(c1, half, 3, 2, 1), nn.BatchNorm2d(half), nn.GELU(), nn.Conv2d(half, c2, 3, 2, 1), nn.BatchNorm2d(c2))


def _down(c1: int, c2: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c1, c2, 3, 2, 1), nn.BatchNorm2d(c2))


def _blocks(width: int, heads: int, topk: int, rates: Sequence[float], options: Mapping[str, Any]) -> nn.Sequential:
    return nn.Sequential(*(BiFormerBlock(width, heads, topk=topk, drop_path=rate, **options) for rate in rates))
