"""FasterNet: a 3x3 convolution on a quarter of the channels, then a pointwise MLP.

Run, Don't Walk: Chasing Higher FLOPS for Faster Neural Networks, arXiv 2303.03667.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.backbones.whole import listed_by_stage
from models.layers.attention.ops.common import DropPath, per_channel
from models.layers.conv import ACTIVATIONS
from models.spec import channel_rules as rules
from models.spec.registry import register

PAPER = "Run, Don't Walk: Chasing Higher FLOPS for Faster Neural Networks, arXiv 2303.03667"


@register("PConv", channels=rules.same_width, kind="backbone", paper=PAPER)
class PConv(nn.Module):
    """A 3x3 convolution on the first ``dim // n_div`` channels; the others pass (section 3.3 of the paper).

    Args:
        dim: channels in and out.
        n_div: the share that is convolved is one in ``n_div``.
        forward: ``split_cat`` or ``slicing``, the published code's two ways to compute the same; here there is one way for both.

    Raises:
        ValueError: no channel to convolve, or another ``forward``.
    """

    def __init__(self, dim: int, n_div: int = 4, forward: str = "split_cat") -> None:
        super().__init__()
        if forward not in ("split_cat", "slicing"):
            raise ValueError(f"PConv: forward {forward!r} is neither 'split_cat' nor 'slicing'")
        self.convolved = dim // n_div
        if self.convolved < 1:
            raise ValueError(f"PConv: n_div {n_div} leaves none of {dim} channels to convolve")
        self.partial_conv3 = nn.Conv2d(self.convolved, self.convolved, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return torch.cat((self.partial_conv3(x[:, : self.convolved]), x[:, self.convolved :]), 1)


@register("FasterNetBlock", channels=rules.same_width, kind="backbone", paper=PAPER)
class FasterNetBlock(nn.Module):
    """x + γ · conv1x1(act(BN(conv1x1(PConv(x))))) (figure 4 of the paper).

    Args:
        dim: channels in and out.
        n_div: see PConv.
        mlp_ratio: hidden width, in multiples of ``dim``.
        drop_path: rate of stochastic depth.
        layer_scale_init_value: start of γ; at 0 there is none.
        act_layer: name of the activation: GELU in FasterNet-T0 and -T1, else ReLU.
        norm_layer: ``BatchNorm2d``, the only one of the published networks.
        pconv_fw_type: see PConv's ``forward``.

    Raises:
        ValueError: an unknown activation or norm.
    """

    def __init__(
        self,
        dim: int,
        n_div: int = 4,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 0.0,
        act_layer: str = "GELU",
        norm_layer: str = "BatchNorm2d",
        pconv_fw_type: str = "split_cat",
    ) -> None:
        super().__init__()
        if act_layer not in ACTIVATIONS or norm_layer != "BatchNorm2d":
            raise ValueError(
                f"FasterNetBlock: act_layer {act_layer!r} should be an activation's name, norm_layer {norm_layer!r} BatchNorm2d"
            )
        hidden = int(dim * mlp_ratio)
        self.spatial_mixing = PConv(dim, n_div, pconv_fw_type)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden), ACTIVATIONS[act_layer](), nn.Conv2d(hidden, dim, 1, bias=False)
        )
        self.layer_scale = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if layer_scale_init_value > 0 else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        out = self.mlp(self.spatial_mixing(x))
        return x + self.drop_path(out if self.layer_scale is None else per_channel(self.layer_scale) * out)


@register("FasterNetStage", channels=rules.out_width_repeated, kind="backbone", paper=PAPER)
class FasterNetStage(nn.Sequential):
    """Embedding by a strided convolution and batch norm, then ``n`` blocks: (B, c1, H, W) -> (B, c2, H / patch, W / patch).

    Args:
        c1: channels in.
        c2: channels out.
        n: number of blocks.
        patch: kernel and stride of the embedding: 4 at the image, 2 between stages.
        act_layer: see FasterNetBlock.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, patch: int = 2, act_layer: str = "GELU", drop_path: float = 0.0) -> None:
        super().__init__(
            nn.Conv2d(c1, c2, patch, patch, bias=False),
            nn.BatchNorm2d(c2),
            *(FasterNetBlock(c2, drop_path=drop_path, act_layer=act_layer) for _ in range(n)),
        )


@register("FasterNet", channels=listed_by_stage("yolov8-FasterNet.yaml"), kind="backbone", paper=PAPER)
class FasterNet(nn.Module):
    """The four stages; gives their maps. The defaults are FasterNet-T0.

    Args:
        in_chans: channels of the image.
        embed_dim: channels of the first stage; they double from stage to stage.
        depths: blocks of each stage.
        act_layer: see FasterNetBlock.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 40,
        *,
        depths: tuple[int, ...] = (1, 2, 8, 2),
        act_layer: str = "GELU",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [in_chans, *(embed_dim * 2**i for i in range(len(depths)))]
        self.stages = nn.ModuleList(
            FasterNetStage(widths[i], widths[i + 1], n, 2 if i else 4, act_layer, drop_path) for i, n in enumerate(depths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> maps at strides 4, 8, 16 and 32."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
