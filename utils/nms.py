"""Non-maximum suppression: from everything a head decodes to the boxes that are kept, best score first.

A batch costs one selection on the device, one look at its counts from the host, and one call of torchvision's suppression per image.
Nothing is dropped for lack of time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from utils.types import Detections, Predictions

FIRST_LOOK = 8  # candidates looked at first, as a multiple of ``max_det``


def non_max_suppression(
    predictions: Predictions,
    *,
    conf: float = 0.25,
    iou: float = 0.45,
    max_det: int = 300,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    max_candidates: int = 30000,
) -> list[Detections]:
    """Keeps the best of boxes that overlap.

    Args:
        predictions: Boxes (B, N, 4) xyxy px and scores (B, N, C).
        conf: Only scores above this take part.
        iou: A box is dropped if it overlaps a better one of its class by more than this.
        max_det: The most detections of an image.
        classes: Only these classes are kept; None keeps all. With ``multi_label=False`` a box whose best class is another one is dropped.
        agnostic: Boxes compete across classes.
        multi_label: A box counts once for every class above ``conf`` (validation), not only for its best class.
        max_candidates: The most candidates (best scores) of an image that enter suppression.

    Returns:
        One ``Detections`` per image, in order.
    """
    boxes = predictions.boxes
    scores, labels = _candidate_scores(predictions.scores, classes, multi_label=multi_label)  # (B, N * C) or (B, N)
    above = scores > conf
    counts = above.sum(dim=1).clamp(max=max_candidates).tolist()  # the one look of the host
    per_box = scores.shape[1] // max(boxes.shape[1], 1)
    scores, index = torch.where(above, scores, scores.new_tensor(float("-inf"))).topk(max(counts, default=0), dim=1)  # (B, K)
    labels = labels.expand(above.shape).gather(1, index)
    anchor = index // max(per_box, 1)
    boxes = boxes.gather(1, anchor[..., None].expand(-1, -1, 4))  # (B, K, 4)
    return [
        _suppress(Detections(b[:n], s[:n], c[:n]), iou=iou, max_det=max_det, agnostic=agnostic)
        for b, s, c, n in zip(boxes, scores, labels, counts)
    ]


def _candidate_scores(scores: Tensor, classes: Sequence[int] | None, *, multi_label: bool) -> tuple[Tensor, Tensor]:
    """Flat scores and the class of each; scores of unwanted classes become minus infinity."""
    batch, _, nc = scores.shape
    if not multi_label and nc > 1:
        values, labels = scores.max(dim=2)
    else:
        values = scores.flatten(1)
        labels = torch.arange(nc, device=scores.device).repeat(scores.shape[1])[None].expand(batch, -1)
    if classes is not None:
        wanted = torch.zeros(nc, dtype=torch.bool, device=scores.device)
        wanted[[c for c in classes if 0 <= c < nc]] = True
        values = torch.where(wanted[labels], values, values.new_tensor(float("-inf")))
    return values, labels


def _suppress(found: Detections, *, iou: float, max_det: int, agnostic: bool) -> Detections:
    """Greedy suppression of one image's candidates, which come best score first.

    Whether a candidate is kept depends only on better ones, so the first ``max_det`` kept of a prefix are those of the whole: a prefix is
    tried first, and most images never need more.
    """
    spread = found.boxes.float()  # half precision overflows with the offsets
    if not agnostic and len(spread):
        extent = spread.max() - spread.min() + 1
        spread = spread + (found.classes * extent)[:, None]  # classes lie side by side and never meet
    scores = found.scores.float()
    first = FIRST_LOOK * max_det
    keep = nms(spread[:first], scores[:first], iou)
    if len(keep) < max_det and len(spread) > first:
        keep = nms(spread, scores, iou)
    keep = keep[:max_det]
    return Detections(found.boxes[keep], found.scores[keep], found.classes[keep])
