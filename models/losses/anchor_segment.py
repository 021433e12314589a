"""The loss of YOLOv5's segmentation head: that of its boxes, and the masks of the matched places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.assigners.anchor_ratio import AnchorGrid, Matches
from models.assigners.targets import can_count_without_wait, rows_of_places
from models.losses.mask_pixels import Grid
from models.losses.masks import Learned, mask_loss
from models.losses.segment import PROTOTYPES, target_boxes_px, target_masks
from models.losses.yolov5 import AnchorLoss
from utils.types import Batch

if TYPE_CHECKING:
    from models.heads.base import HeadOutput


class AnchorSegmentLoss(AnchorLoss):
    """:class:`AnchorLoss` with the part ``seg``: of each level and image the mean over its matches, added, divided by the images.

    Args:
        masks: number of prototypes; a place's last outputs are its coefficients.
        arguments: as there.
    """

    names = ("box", "obj", "cls", "seg")

    def __init__(self, *arguments: Any, masks: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.masks, self.outputs = masks, self.outputs + masks

    def _further(
        self, output: HeadOutput, batch: Batch, grid: AnchorGrid, hw_px: tuple[float, float], images: float
    ) -> Callable[[Tensor, Matches], Sequence[Tensor]]:
        prototypes = output.shared[PROTOTYPES]
        targets = batch.targets.to(prototypes.device)
        rows = rows_of_places(targets.image, batch_size=len(prototypes), max_boxes=batch.max_boxes)
        cells = Grid((prototypes.shape[-2], prototypes.shape[-1]), hw_px, target_masks(targets), targets.mask_width)
        boxes = target_boxes_px(targets, hw_px)

        def seg(picked: Tensor, matches: Matches) -> Sequence[Tensor]:
            weight = self._mask_weights(grid, matches) / images
            image = torch.arange(len(rows), device=rows.device)[:, None].expand_as(matches.box)
            learned = Learned(image.flatten(), rows.gather(1, matches.box).flatten(), weight.flatten())
            coefficients = picked[:, 5 + self.nc :].transpose(1, 2).flatten(0, 1)  # (B · R, masks)
            if can_count_without_wait(weight):
                counted = learned.weight.nonzero().squeeze(1)
                learned, coefficients = Learned(*(t[counted] for t in learned)), coefficients[counted]
            return (mask_loss(coefficients, prototypes, learned, boxes, cells),)

        return seg

    def _mask_weights(self, grid: AnchorGrid, matches: Matches) -> Tensor:
        """Weights (B, R) that make a sum over matches the sum of each level's and image's mean."""
        level = grid.level[matches.place]
        counts = matches.mask.new_zeros(len(level), len(self.strides), dtype=torch.float32)
        counts = counts.scatter_add_(1, level, matches.mask.float()).clamp(min=1)
        return matches.mask / counts.gather(1, level)
