"""CloFormer as a backbone: a row a stage, and the whole network under its published parameter names.

Rethinking Local Perception in Lightweight Vision Transformer, arXiv 2303.17803. Published sizes: XXS (32 64 128 256 channels, heads
4 4 8 16), XS (48 96 160 352, 3 6 10 22), S (64 128 224 448, 4 8 14 28), all with blocks 2 2 6 2, kernels 3 5 7 9 and windows 8 4 2 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.backbones.whole import ends, listed_by_stage, ramp, rename_prefixes
from models.layers.attention.cloformer import PAPER, CloBlock
from models.spec import channel_rules as rules
from models.spec.registry import register


class _ConvBNReLU(nn.Module):
    """A 3x3 convolution with bias, batch norm and ReLU, key ``conv``."""

    def __init__(self, c1: int, c2: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(c1, c2, 3, stride, 1), nn.BatchNorm2d(c2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@register("CloFormerStem", channels=rules.out_width, kind="backbone", paper=PAPER)
class CloFormerStem(nn.Module):
    """CloFormer's patch embedding: four 3x3 convolutions (the first two of stride 2), a 1x1 convolution and normalisation.

    Args:
        c1: channels in.
        c2: channels out.
    """

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.conv1 = _ConvBNReLU(c1, c2 // 2, 2)
        self.conv2 = _ConvBNReLU(c2 // 2, c2, 2)
        self.conv3 = _ConvBNReLU(c2, c2, 1)
        self.conv4 = _ConvBNReLU(c2, c2, 1)
        self.conv5 = nn.Conv2d(c2, c2, 1)
        self.layernorm = nn.GroupNorm(1, c2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, H / 4, W / 4), rounded up."""
        return self.layernorm(self.conv5(self.conv4(self.conv3(self.conv2(self.conv1(x))))))


@register("CloFormerStage", channels=rules.out_width_repeated, kind="backbone", paper=PAPER)
class CloFormerStage(nn.Module):
    """One stage of CloFormer: ``n`` blocks, the last of which halves the map and widens it.

    Args:
        c1: channels in.
        c2: channels out.
        n: blocks.
        num_heads: heads of the attention.
        group_split: heads of the local branches and of the global one; None for an even split.
        kernel_sizes: kernel of each local branch.
        window_size: pooling window of the global branch.
        stride: 2, or 1 for the last stage (then ``c2`` is ``c1``).
        drop_path: rate of stochastic depth, one number or that of the first and the last block.
        block: further options of CloBlock.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        n: int = 2,
        num_heads: int = 8,
        group_split: Sequence[int] | None = None,
        kernel_sizes: Sequence[int] = (5,),
        window_size: int = 7,
        stride: int = 2,
        *,
        drop_path: float | Sequence[float] = 0.0,
        **block: Any,
    ) -> None:
        super().__init__()
        attention = (num_heads, group_split, kernel_sizes, window_size)
        *rates, last = ramp(*ends(drop_path), n)
        self.blocks = nn.Sequential(
            *(CloBlock(c1, c1, *attention, drop_path=rate, **block) for rate in rates),
            CloBlock(c1, c2, *attention, stride=stride, drop_path=last, **block),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, H / stride, W / stride), rounded up."""
        return self.blocks(x)


@register("CloFormerBackbone", channels=listed_by_stage("yolov8-CloFormer-XXS.yaml"), kind="backbone", paper=PAPER)
class CloFormerBackbone(nn.Module):
    """All of CloFormer under its published parameter names; gives the embedding and the outputs of the four stages.

    Args:
        in_chans: channels of the image.
        num_classes: above 0, the classifier of published weights is built so that they load; the maps do not depend on it.
        embed_dims: channels of each stage's input.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        group_splits: heads of the branches of each stage.
        kernel_sizes: kernels of the local branches of each stage.
        window_sizes: pooling window of each stage.
        mlp_kernel_sizes: kernel of each stage's ConvFFN.
        mlp_ratios: hidden width of each stage's ConvFFN.
        drop_path_rate: stochastic depth of the last block; it grows from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 0,
        *,
        embed_dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        group_splits: Sequence[Sequence[int]] = ((3, 1), (2, 2), (4, 4), (4, 12)),
        kernel_sizes: Sequence[Sequence[int]] = ((3,), (5,), (7,), (9,)),
        window_sizes: Sequence[int] = (8, 4, 2, 1),
        mlp_kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_embed = CloFormerStem(in_chans, embed_dims[0])
        rates = ramp(0.0, drop_path_rate, sum(depths))
        outs = (*embed_dims[1:], embed_dims[-1])
        self.layers = nn.ModuleList()
        for i, (width, out) in enumerate(zip(embed_dims, outs)):
            done = sum(depths[:i])
            self.layers.append(
                CloFormerStage(
                    width,
                    out,
                    depths[i],
                    num_heads[i],
                    group_splits[i],
                    kernel_sizes[i],
                    window_sizes[i],
                    2 if i + 1 < len(embed_dims) else 1,
                    drop_path=(rates[done], rates[done + depths[i] - 1]),
                    mlp_kernel_size=mlp_kernel_sizes[i],
                    mlp_ratio=mlp_ratios[i],
                )
            )
        if num_classes:
            self.norm = nn.GroupNorm(1, embed_dims[-1])
            self.head = nn.Linear(embed_dims[-1], num_classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> maps at strides 4 (the embedding), 8, 16, 32 and 32."""
        maps = [self.patch_embed(x)]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        return maps


def rows_from_published(state: Mapping[str, Tensor], first_row: int = 0) -> dict[str, Tensor]:
    """Published weights under the names that a CloFormerStem and its CloFormerStage rows have in a network, ``model.<row>.…``.

    Args:
        state: the published state dict, keys as in CloFormerBackbone; its classifier is left out.
        first_row: row of the stem.
    """
    stages = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))
    prefixes: dict[str, Any] = {f"layers.{i}.": f"model.{first_row + 1 + i}." for i in range(stages)}
    return rename_prefixes(state, {"patch_embed.": f"model.{first_row}.", **prefixes})
