"""Regression losses by name: one minus a member of the IoU family, its variants, and WIoU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from utils.distributed import all_reduce_sum
from utils.errors import UserError, nearest
from utils.iou import SIMILARITIES, compare, iou, mdpiou, nwd

ALPHA = 3.0  # exponent of alpha-IoU that the paper recommends
INNER_RATIO = 0.7  # scale of Inner-IoU's auxiliary boxes; below 1 helps large overlaps, above 1 small ones
FOCALER_RANGE = (0.0, 0.95)  # overlaps between which Focaler-IoU spreads its values
WISE_MOMENTUM = 1e-4  # weight of a new batch in WIoU's running mean
WISE_ALPHA, WISE_DELTA = 1.9, 3.0  # WIoU v3's focusing
PREFIXES = ("alpha", "Inner", "Focaler")
WISE = ("WIoU", "WIoU-v1", "WIoU-v2", "WIoU-v3")  # WIoU alone is v3
NAMES = (*SIMILARITIES, "NWD", *WISE, *(f"{p}-{s}" for p in PREFIXES for s in SIMILARITIES))


class BoxFit(NamedTuple):
    """Regression loss of predicted boxes, and the similarity (at most 1) from which objectness and quality targets are computed."""

    loss: Tensor
    similarity: Tensor


class BoxLoss:
    """The regression loss that a hyp file names under ``iou_loss``.

    WIoU keeps the running mean of 1 − IoU, its only state; it starts at 1 and is stored in checkpoints through :meth:`state_dict`.

    Args:
        name: one of ``NAMES``, such as ``CIoU``, ``Inner-SIoU`` or ``WIoU-v3``.

    Raises:
        UserError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise UserError(f"iou_loss {name!r}: unknown, {nearest(name, NAMES) or 'known are ' + ', '.join(NAMES)}")
        self.name = name
        self.mean: Tensor | None = None

    @property
    def keeps_state(self) -> bool:
        """Whether a call depends on the calls before it."""
        return self.name in WISE

    def state_dict(self) -> dict[str, Tensor]:
        """WIoU's running mean after the first batch; empty for all other losses."""
        return {} if self.mean is None else {"mean": self.mean.detach().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a saved state; an empty one resets the running mean."""
        self.mean = state.get("mean")

    def __call__(self, predicted_xyxy: Tensor, true_xyxy: Tensor, *, mask: Tensor, image_hw: tuple[float, float]) -> BoxFit:
        """Loss and similarity (...) of aligned boxes (..., 4) px.

        Args:
            predicted_xyxy: with gradient.
            true_xyxy: without.
            mask: (...) bool, which pairs count in WIoU's running mean.
            image_hw: px, for MDPIoU.
        """
        if self.name in WISE:
            return self._wise(predicted_xyxy, true_xyxy, mask)
        value = similarity(self.name, predicted_xyxy, true_xyxy, image_hw=image_hw)
        return BoxFit(1 - value, value)

    def _wise(self, predicted_xyxy: Tensor, true_xyxy: Tensor, mask: Tensor) -> BoxFit:
        """R · (1 − IoU), R = exp(ρ²/c²) with c² constant for the gradient (arXiv 2301.10051, eq. 5–6), times the focusing of v2 or v3."""
        pair = compare(predicted_xyxy, true_xyxy)
        loss = 1 - pair.iou
        with torch.no_grad():
            mean = torch.ones_like(loss.sum()) if self.mean is None else self.mean.to(loss)
            if predicted_xyxy.requires_grad:  # validation does not update the running mean
                mean = self.mean = _running_mean(mean, loss, mask)
            scale = wise_focus(loss / mean, self.name)
        return BoxFit(scale * torch.exp(pair.distance2 / pair.diagonal2.detach()) * loss, pair.iou)


def _running_mean(before: Tensor, loss: Tensor, mask: Tensor) -> Tensor:
    """WIoU's mean after a batch, equal on all ranks; unchanged by a batch without boxes or with a non-finite loss."""
    total, count = all_reduce_sum(torch.stack(((loss * mask).sum(), mask.sum().to(loss))))
    moved = (1 - WISE_MOMENTUM) * before + WISE_MOMENTUM * total / count.clamp(min=1)
    return torch.where((count > 0) & torch.isfinite(total), moved, before)


def similarity(name: str, boxes1_xyxy: Tensor, boxes2_xyxy: Tensor, *, image_hw: tuple[float, float] = (640.0, 640.0)) -> Tensor:
    """The named similarity (...) of boxes (..., 4), WIoU excepted."""
    if name == "NWD":
        return nwd(boxes1_xyxy, boxes2_xyxy)
    prefix, _, plain = name.rpartition("-")
    function = partial(mdpiou, image_hw=image_hw) if plain == "MDPIoU" else SIMILARITIES[plain]
    if prefix == "alpha":
        return function(boxes1_xyxy, boxes2_xyxy, alpha=ALPHA)
    value = function(boxes1_xyxy, boxes2_xyxy)
    if not prefix:
        return value
    overlap = iou(boxes1_xyxy, boxes2_xyxy)
    if prefix == "Inner":
        return value - overlap + iou(scaled(boxes1_xyxy, INNER_RATIO), scaled(boxes2_xyxy, INNER_RATIO))
    low, high = FOCALER_RANGE
    return value - overlap + ((overlap - low) / (high - low)).clamp(0, 1)


def scaled(boxes_xyxy: Tensor, ratio: float) -> Tensor:
    """Boxes of ``ratio`` times the size about the same centres."""
    low, high = boxes_xyxy.chunk(2, dim=-1)
    centre, half = (low + high) / 2, (high - low) * (ratio / 2)
    return torch.cat((centre - half, centre + half), dim=-1)


def wise_focus(outlierness: Tensor, name: str) -> Tensor:
    """WIoU's weight for β = (1 − IoU) / mean: 1 in v1, √β in v2 (eq. 8 with γ = 0.5), β / (δ α^(β − δ)) in v3 (eq. 10)."""
    if name == "WIoU-v1":
        return torch.ones_like(outlierness)
    if name == "WIoU-v2":
        return outlierness.sqrt()
    return outlierness / (WISE_DELTA * WISE_ALPHA ** (outlierness - WISE_DELTA))
