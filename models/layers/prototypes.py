"""Prototype masks: maps of the whole image of which a detection's mask is a weighted sum.

YOLACT: Real-time Instance Segmentation, arXiv 1904.02689, section 3.1; at a quarter of the image's size, as all YOLOs have them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.conv import Conv


class Prototypes(nn.Module):
    """YOLOv8's: (B, c1, H, W) to prototypes (B, masks, 2H, 2W), doubled by a transposed convolution.

    Args:
        c1: input channels.
        hidden: width between.
        masks: number of prototypes.
    """

    def __init__(self, c1: int, hidden: int = 256, masks: int = 32) -> None:
        super().__init__()
        self.cv1 = Conv(c1, hidden, 3)
        self.upsample = self._doubling(hidden)
        self.cv2 = Conv(hidden, hidden, 3)
        self.cv3 = Conv(hidden, masks)

    def _doubling(self, hidden: int) -> nn.Module:
        return nn.ConvTranspose2d(hidden, hidden, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(self.cv2(self.upsample(self.cv1(x))))


class NearestPrototypes(Prototypes):
    """YOLOv5's and YOLOv9's: the same with nearest-neighbour up-sampling, which has no parameters."""

    def _doubling(self, hidden: int) -> nn.Module:
        return nn.Upsample(scale_factor=2, mode="nearest")


class FusedPrototypes(Prototypes):
    """YOLO26's: the coarser levels are brought to the first one's width and size and added to it before the prototypes are computed.

    In training a map of the classes at each pixel is computed beside, which only the loss reads.

    Args:
        channels: width of each level, the finest first.
        hidden: width between.
        masks: number of prototypes.
        nc: classes of the semantic map; 0 for none.
    """

    def __init__(self, channels: Sequence[int], hidden: int = 256, masks: int = 32, nc: int = 80) -> None:
        super().__init__(hidden, hidden, masks)
        first = channels[0]
        self.feat_refine = nn.ModuleList(Conv(c, first) for c in channels[1:])
        self.feat_fuse = Conv(first, hidden, 3)
        if nc:
            self.semseg = nn.Sequential(Conv(first, hidden, 3), Conv(hidden, hidden, 3), nn.Conv2d(hidden, nc, 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Levels (B, C_i, H_i, W_i) to prototypes (B, masks, 2 H_0, 2 W_0)."""
        return super().forward(self.feat_fuse(self.fuse_levels(features)))

    def fuse_levels(self, features: Sequence[Tensor]) -> Tensor:
        """The sum of all levels at the size of the first: (B, C_0, H_0, W_0)."""
        total = features[0]
        for refine, level in zip(self.feat_refine, features[1:]):
            total = total + F.interpolate(refine(level), size=features[0].shape[-2:], mode="nearest")
        return total

    def without_semantic(self) -> FusedPrototypes:
        """The same, sharing its parameters, without the semantic map."""
        lean = type(self).__new__(type(self))
        nn.Module.__init__(lean)
        for name, module in self.named_children():
            if name != "semseg":
                lean.add_module(name, module)
        return lean.train(self.training)

    def with_semantic(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Prototypes, and class logits (B, nc, H_0, W_0)."""
        fused = self.fuse_levels(features)
        return super().forward(self.feat_fuse(fused)), self.semseg(fused)
