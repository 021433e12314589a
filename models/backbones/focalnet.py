"""FocalNet as a backbone: a row a stage, and the whole network under its published parameter names.

Focal Modulation Networks, arXiv 2203.11926. Published sizes: tiny (96 channels, blocks 2 2 6 2), small (96, 2 2 18 2), base (128,
2 2 18 2); each with 2 focal levels (srf, small receptive field) or 3 (lrf).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.backbones.whole import ends, listed_by_stage, ramp, rename_prefixes
from models.layers.attention.focalnet import PAPER, FocalModulationBlock
from models.layers.attention.ops.common import ChannelLayerNorm
from models.spec import channel_rules as rules
from models.spec.registry import register


class PatchEmbed(nn.Module):
    """A strided convolution and layer normalisation: patches side by side, or overlapping ones.

    Args:
        c1: channels in.
        c2: channels out.
        patch: stride, 4 at the image, 2 between stages.
        overlap: kernel 7 (padding 2) at stride 4, 3 (padding 1) at stride 2; else kernel and stride agree.
    """

    def __init__(self, c1: int, c2: int, patch: int, *, overlap: bool = False) -> None:
        super().__init__()
        kernel, padding = ((7, 2) if patch == 4 else (3, 1)) if overlap else (patch, 0)
        self.proj = nn.Conv2d(c1, c2, kernel, patch, padding)
        self.norm = ChannelLayerNorm(c2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, H / patch, W / patch)."""
        return self.norm(self.proj(x))


@register("FocalNetStage", channels=rules.out_width_repeated, kind="backbone", paper=PAPER)
class FocalNetStage(nn.Module):
    """One stage of FocalNet: patch embedding, then ``n`` blocks.

    Args:
        c1: channels in.
        c2: channels out.
        n: blocks.
        patch: stride of the embedding, 4 for the first stage.
        focal_level: levels of the modulation.
        focal_window: kernel of its first level.
        conv_embed: overlapping patches.
        drop_path: rate of stochastic depth, one number or that of the first and the last block.
        block: further options of FocalModulationBlock.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        n: int = 2,
        patch: int = 2,
        focal_level: int = 2,
        focal_window: int = 3,
        *,
        conv_embed: bool = False,
        drop_path: float | Sequence[float] = 0.0,
        **block: Any,
    ) -> None:
        super().__init__()
        self.embed = PatchEmbed(c1, c2, patch, overlap=conv_embed)
        options = {"focal_level": focal_level, "focal_window": focal_window, **block}
        self.blocks = nn.Sequential(*(FocalModulationBlock(c2, drop_path=rate, **options) for rate in ramp(*ends(drop_path), n)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, H / patch, W / patch)."""
        return self.blocks(self.embed(x))


@register("FocalNetBackbone", channels=listed_by_stage("yolov8-FocalNet-T-srf.yaml"), kind="backbone", paper=PAPER)
class FocalNetBackbone(nn.Module):
    """All of FocalNet under its published parameter names; gives the maps of the four stages.

    Args:
        in_chans: channels of the image.
        embed_dim: channels of the first stage; they double from stage to stage.
        depths: blocks of each stage.
        focal_levels: levels of each stage.
        focal_windows: first kernel of each stage.
        num_classes: above 0, the classifier of published weights is built so that they load; the maps do not depend on it.
        drop_path_rate: stochastic depth of the last block; it grows from 0.
        use_conv_embed: overlapping patches.
        block: further options of FocalModulationBlock.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 96,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        focal_levels: Sequence[int] = (2, 2, 2, 2),
        focal_windows: Sequence[int] = (3, 3, 3, 3),
        num_classes: int = 0,
        drop_path_rate: float = 0.0,
        use_conv_embed: bool = False,
        **block: Any,
    ) -> None:
        super().__init__()
        widths = [embed_dim * 2**i for i in range(len(depths))]
        rates = iter(ramp(0.0, drop_path_rate, sum(depths)))
        self.patch_embed = PatchEmbed(in_chans, embed_dim, 4, overlap=use_conv_embed)
        self.layers = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths)):
            options = {"focal_level": focal_levels[i], "focal_window": focal_windows[i], **block}
            blocks = [FocalModulationBlock(width, drop_path=next(rates), **options) for _ in range(depth)]
            is_last = i + 1 == len(depths)
            self.layers.append(_Stage(blocks, None if is_last else PatchEmbed(width, 2 * width, 2, overlap=use_conv_embed)))
        if num_classes:
            self.norm = nn.LayerNorm(widths[-1])
            self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> maps at strides 4, 8, 16 and 32."""
        maps: list[Tensor] = []
        x = self.patch_embed(x)
        for stage in self.layers:
            made, x = stage(x)
            maps.append(made)
        return maps


class _Stage(nn.Module):
    """The published container of a stage: ``blocks``, and ``downsample``, the patch embedding of the next stage, if there is one."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> its map (B, C, H, W) and the next stage's input (B, 2C, H / 2, W / 2); the last stage gives its map twice."""
        made = self.blocks(x)
        return made, made if self.downsample is None else self.downsample(made)


def rows_from_published(state: Mapping[str, Tensor], first_row: int = 0) -> dict[str, Tensor]:
    """Published weights under the names that FocalNetStage rows have in a network, ``model.<row>.…``; the classifier is left out.

    Args:
        state: the published state dict, keys as in FocalNetBackbone.
        first_row: row of the first stage.
    """
    stages = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))
    prefixes = {"patch_embed.": f"model.{first_row}.embed."}
    for i in range(stages):
        prefixes[f"layers.{i}.blocks."] = f"model.{first_row + i}.blocks."
        prefixes[f"layers.{i}.downsample."] = f"model.{first_row + i + 1}.embed."
    return rename_prefixes(state, prefixes)
