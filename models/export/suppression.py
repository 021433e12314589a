"""Suppression as a layer of a network, by ONNX's standard operator NonMaxSuppression, and the outputs of a file that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from utils.types import Predictions

DETECTIONS = ("num_dets", "det_boxes", "det_scores", "det_classes")  # outputs of the file
CANDIDATES = ("boxes", "scores")  # tensors inside, which the detections are selected from
OUTPUTS = {**{name: {0: "batch"} for name in DETECTIONS}, **{name: {} for name in CANDIDATES}}  # name -> free axes


class Suppression(nn.Module):
    """Suppression within each class, with outputs whose size does not depend on the number of detections.

    Args:
        topk: largest number of detections per image; also the length of the outputs.
        iou: boxes that overlap a box of the same class and a higher score by more than this are dropped.
        conf: only boxes with a score above this are candidates.
    """

    def __init__(self, *, topk: int, iou: float, conf: float) -> None:
        super().__init__()
        self.topk, self.iou, self.conf = topk, iou, conf

    def forward(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes (B, N, 4) xyxy px, scores (B, N, nc) to counts (B, 1) int32, boxes (B, topk, 4), scores (B, topk), classes (B, topk) int32.

        Best score first; rows after the count are zero.
        """
        best, classes = scores.max(dim=2)  # (B, N); a box counts for its best class only
        candidates = torch.where(F.one_hot(classes, scores.shape[2]).bool(), scores, torch.zeros_like(scores))
        chosen = _Operator.apply(boxes, candidates.transpose(1, 2), self.topk, self.iou, self.conf)  # (K, 3)
        kept = torch.zeros_like(best).index_put((chosen[:, 0], chosen[:, 2]), torch.ones_like(chosen[:, 0], dtype=best.dtype))
        # topk needs that many rows, even where there are fewer boxes
        best, boxes, classes = F.pad(best * kept, (0, self.topk)), F.pad(boxes, (0, 0, 0, self.topk)), F.pad(classes, (0, self.topk))
        det_scores, index = best.topk(self.topk, dim=1)  # (B, topk)
        valid = det_scores > 0
        det_boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * valid[..., None]
        det_classes = classes.gather(1, index) * valid
        return valid.sum(dim=1, keepdim=True).int(), det_boxes, det_scores, det_classes.int()


class _Operator(torch.autograd.Function):
    """NonMaxSuppression as ONNX defines it: within each image and class, rows of [image, class, box] that remain."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, topk: int, iou: float, conf: float) -> Tensor:
        """Boxes (B, N, 4) xyxy and scores (B, C, N) to (K, 3) int64. For tracing and comparison; the file runs its runtime's operator."""
        rows = [torch.zeros(0, 3, dtype=torch.int64, device=boxes.device)]
        for image, label in (scores > conf).any(dim=2).nonzero().tolist():
            above = (scores[image, label] > conf).nonzero().flatten()
            kept = above[nms(boxes[image, above], scores[image, label, above], iou)[:topk]]
            rows.append(F.pad(kept[:, None], (2, 0)) + kept.new_tensor([image, label, 0]))
        return torch.cat(rows)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, topk: int, iou: float, conf: float) -> Any:
        constants = (
            g.op("Constant", value_t=value) for value in (torch.tensor([topk]), torch.tensor([iou]).float(), torch.tensor([conf]).float())
        )
        return g.op("NonMaxSuppression", boxes, scores, *constants)


def threshold_in_widest_gap(scores: Tensor, *, least: int = 8, most: int = 64) -> float:
    """A confidence that ``least`` to ``most`` boxes of the first image exceed, in the widest gap between two of their scores (B, N, nc)."""
    best = scores[0].amax(dim=1).double().sort(descending=True).values[: most + 1]  # (n,)
    if len(best) < 2:
        return 0.0
    first = min(least - 1, len(best) - 2)
    above, below = best[first:-1], best[first + 1 :]
    widest = int((above - below).argmax())
    return float(above[widest] + below[widest]) / 2


def decode_detections(outputs: Sequence[Tensor], *, nc: int) -> Predictions:
    """Detections as predictions whose other scores are zero, so that suppressing them again changes nothing.

    Args:
        outputs: num_dets (B, 1), det_boxes (B, K, 4) xyxy px, det_scores (B, K) and det_classes (B, K).
        nc: number of classes.

    Raises:
        ValueError: another number of outputs.
    """
    if len(outputs) != len(DETECTIONS):
        raise ValueError(f"the {len(DETECTIONS)} outputs {', '.join(DETECTIONS)} are needed")
    counts, boxes, best, classes = outputs
    valid = torch.arange(best.shape[1], device=best.device)[None] < counts  # (B, K)
    scores = torch.zeros(*best.shape, nc, device=best.device)
    scores.scatter_(2, classes.long().clamp(0, nc - 1)[..., None], (best.float() * valid)[..., None])
    return Predictions(boxes.float(), scores)
