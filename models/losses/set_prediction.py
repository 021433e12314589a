"""The loss of heads that predict a set of objects: each box is matched with one query, in every layer of the decoder anew.

DETR, arXiv 2005.12872, section 3.1; RT-DETR, arXiv 2304.08069: varifocal class loss, L1 distance and GIoU, after every layer and after the
choice of the queries, and the same for denoising queries, whose boxes are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.assigners.denoising import group_count, pad_unit_targets
from models.assigners.hungarian import match, require_scipy
from models.assigners.targets import PaddedTargets
from models.losses.box import BoxLoss
from models.losses.classification import ClassLoss, check_class_weights
from utils.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from utils.distributed import all_reduce_sum, world_size
from utils.iou import iou
from utils.types import Batch

if TYPE_CHECKING:
    from models.heads.base import HeadOutput
    from utils.config import Hyperparameters

DENOISING = "denoising"  # name among the head's shared outputs


class SetPredictionLoss:
    """Loss of all layers, each with a matching of its own, and of the denoising queries.

    Each part is a sum over queries, divided by the number of boxes (at least 1, over all ranks), for denoising queries by that of their
    positive copies. The published loss is no mean over images, so the gradient, which the training step multiplies by their number, is
    divided by it; the values are not.

    Args:
        hyp: gains ``box`` (of GIoU, or what ``iou_loss`` names), ``cls`` and ``dfl`` (of the L1 distance of centre and size in 0-1);
            ``cls_loss`` with ``cls_pw``, ``cls_weights``, ``fl_gamma`` and ``label_smoothing``.
        nc: number of classes.

    Raises:
        UserError: scipy is not installed.
    """

    names = ("box", "cls", "l1")

    def __init__(self, hyp: Hyperparameters, *, nc: int) -> None:
        require_scipy()
        check_class_weights(hyp.cls_weights, nc)
        self.nc, self.smoothing = nc, hyp.label_smoothing
        self.gains = (hyp.box, hyp.cls, hyp.dfl)
        self.box_loss = BoxLoss(hyp.iou_loss)
        self.class_loss = ClassLoss(hyp.cls_loss, gamma=hyp.fl_gamma, pos_weight=hyp.cls_pw, class_weights=hyp.cls_weights)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """The same in all epochs."""

    def compile(self, *, backend: str) -> str:
        """Why it cannot."""
        return "queries and boxes are matched on the host"

    def state_dict(self) -> dict[str, Tensor]:
        """The regression loss's running mean, if it has one."""
        return self.box_loss.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the state of :meth:`state_dict`."""
        self.box_loss.load_state_dict(state)

    def __call__(self, output: HeadOutput, batch: Batch) -> dict[str, Tensor]:
        """Scalar parts after gains, in float32 or more also under autocast."""
        layers = torch.stack([maps[0] for maps in output.branches])  # (K, B, Q, 4 + nc)
        with torch.autocast(layers.device.type, enabled=False):
            targets = pad_unit_targets(batch, batch.max_boxes)
            count = (all_reduce_sum(targets.valid.sum()).to(layers.dtype) / world_size()).clamp(min=1 / world_size())
            sums = self._matched(layers, targets) / count
            if DENOISING in output.shared:
                noisy = output.shared[DENOISING].transpose(0, 1)  # (K - 1, B, D, 4 + nc)
                sums = sums + self._denoised(noisy, pad_unit_targets(batch, max(batch.max_boxes, 1)), count)
            parts = [gain * part for gain, part in zip(self.gains, sums.unbind())]
        return dict(zip(self.names, (_with_gradient_of_mean(part, batch) for part in parts)))

    def _matched(self, layers: Tensor, targets: PaddedTargets) -> Tensor:
        """Sums (3,) of the layers' queries, matched with the boxes."""
        boxes, logits = layers[..., :4], layers[..., 4:]
        matches = match(cxcywh_to_xyxy(boxes.detach()), logits.detach(), targets)
        everywhere = torch.ones_like(logits[..., :1], dtype=torch.bool)
        return self._sums(boxes, logits, _Pairs(matches.query, matches.valid, targets.labels, targets.boxes_xyxy, everywhere))

    def _denoised(self, noisy: Tensor, targets: PaddedTargets, count: Tensor) -> Tensor:
        """Parts (3,) of the denoising queries, in the order group, positive or negative, box; the positive ones have boxes."""
        objects = targets.valid.shape[1]
        groups = group_count(objects)
        number = torch.arange(groups * objects, device=noisy.device)
        query = (number // objects * 2 * objects + number % objects).expand(*noisy.shape[:2], -1)
        repeated = PaddedTargets(*(t.repeat(1, groups, *[1] * (t.dim() - 2)) for t in targets if t is not None))
        counts = targets.valid.repeat(1, 2 * groups)[None, :, :, None]
        pairs = _Pairs(query, repeated.valid.expand_as(query), repeated.labels, repeated.boxes_xyxy, counts)
        return self._sums(noisy[..., :4], noisy[..., 4:], pairs) / (count * groups)

    def _sums(self, boxes: Tensor, logits: Tensor, pairs: _Pairs) -> Tensor:
        """Box loss, class loss and L1 distance (3,) of cxcywh boxes (K, B, Q, 4) in 0-1 and logits (K, B, Q, nc)."""
        valid = pairs.valid
        picked = boxes.gather(2, pairs.query[..., None].expand(*valid.shape, 4))  # (K, B, n, 4)
        wanted = torch.where(valid[..., None], pairs.boxes_xyxy.to(boxes.dtype), _whole_image(picked))
        apart = (picked - xyxy_to_cxcywh(wanted)).abs().sum(dim=-1)
        corners = cxcywh_to_xyxy(picked)
        fit = self.box_loss(corners, wanted, mask=valid, image_hw=(1.0, 1.0)).loss
        overlap = iou(corners, wanted).detach().clamp(min=0) * valid
        classes = self._class_loss(logits, pairs, overlap)
        return torch.stack([part.sum() for part in (fit * valid, classes, apart * valid)])

    def _class_loss(self, logits: Tensor, pairs: _Pairs, overlap: Tensor) -> Tensor:
        """(K, B, Q, nc): the target of a matched query's class is its overlap with the box; without any it is left out, as published."""
        place = pairs.query * self.nc + pairs.labels  # (K, B, n)
        empty = torch.zeros_like(logits).flatten(2)
        score = empty.scatter_add(2, place, overlap).view_as(logits)
        matched = empty.scatter_add(2, place, pairs.valid.to(empty.dtype)).view_as(logits)
        if self.smoothing:
            score = score * (1 - self.smoothing) + score.sum(dim=-1, keepdim=True) * (self.smoothing / self.nc)
        losses = self.class_loss(logits, score)
        weights = self.class_loss.class_weights(logits)
        if weights is not None:
            losses = losses * weights.squeeze(1)
        return losses * (pairs.counts & ~((matched > 0) & (score == 0)))


class _Pairs(NamedTuple):
    """Which query of each layer and image is which box's."""

    query: Tensor  # (K, B, n) int64
    valid: Tensor  # (K, B, n) bool
    labels: Tensor  # (B, n) int64
    boxes_xyxy: Tensor  # (B, n, 4) in 0-1
    counts: Tensor  # (..., Q, 1) bool, which queries take part in the class loss


def _whole_image(like: Tensor) -> Tensor:
    """The box of all of an image in place of what is padded, whose size zero would make losses non-finite."""
    return torch.cat((torch.zeros_like(like[..., :2]), torch.ones_like(like[..., 2:])), dim=-1)


def _with_gradient_of_mean(part: Tensor, batch: Batch) -> Tensor:
    """The value of a part with its gradient divided by the number of images, with which the training step multiplies it."""
    mean = part / max(batch.images_of_step, 1)
    return mean + (part - mean).detach()
