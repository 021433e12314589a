"""How far a map can be trusted: what its places are worth when they are taken away or put back, and what random weights make of it.

RISE: Randomized Input Sampling for Explanation, arXiv 1806.07421 (deletion and insertion). Black-box Explanation of Object Detectors via
Saliency Maps (D-RISE), arXiv 2006.03204 (the score of a detection on a changed image). Sanity Checks for Saliency Maps, arXiv 1810.03292.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.analysis.explained_targets import counterparts
from models.analysis.tracing import evaluating
from models.model import Model

STEPS = 20
BATCH = 4
BLUR_SHARE = 1 / 8  # of the shorter side: what is left of the image where nothing has been inserted yet


@dataclass(frozen=True)
class Faithfulness:
    """Two curves over the share of pixels, the most important ones first, and the area under each, in shares of the whole image's score.

    Attributes:
        deletion: (steps + 1,) score as pixels are replaced; the lower the area, the better the map.
        insertion: (steps + 1,) score as pixels are put back; the higher, the better.
    """

    deletion: Tensor
    insertion: Tensor

    @property
    def deletion_area(self) -> float:
        return _area(self.deletion)

    @property
    def insertion_area(self) -> float:
        return _area(self.insertion)


@torch.no_grad()
def faithfulness(model: Model, images: Tensor, cam: Tensor, boxes_xyxy: Tensor, classes: Tensor, *, steps: int = STEPS) -> Faithfulness:
    """Deletion and insertion curves of a map.

    The score of a changed image is the mean over the objects of the largest score · IoU that any candidate has with the object, or of the
    scores of classes of whole images, in those of the unchanged image. Deleted pixels and the image before insertion are the image blurred
    until no object is seen.

    Args:
        model: any.
        images: (1, ch, H, W) in 0-1.
        cam: (H, W), larger is more important; equal values are taken in the order of the pixels.
        boxes_xyxy: (n, 4) px of the input, of the objects that the map explains.
        classes: (n,).
        steps: number of equal steps.
    """
    blurred = _blurred(images)
    order = cam.flatten().to(images.device).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    ranks = rank.view(1, 1, *images.shape[2:])
    counts = [round(len(order) * step / steps) for step in range(steps + 1)]
    scores = []
    for first, second in ((images, blurred), (blurred, images)):
        changed = (torch.where(ranks < count, second, first) for count in counts)
        scores.append(_scores(model, list(changed), boxes_xyxy, classes))
    whole = scores[0][0].clamp(min=1e-12)
    return Faithfulness(scores[0] / whole, scores[1] / whole)


def randomised(model: Model, *, seed: int = 0) -> Model:
    """A copy with all weights drawn anew, each tensor with the mean and deviation that it has: structure without knowledge."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.numel() > 1:
                values = parameter.float().cpu()
                draw = torch.randn(values.shape, generator=generator) * values.std() + values.mean()
                parameter.copy_(draw.to(parameter))
        for module in other.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
    return other


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's ρ of two maps: 1 for the same order of places, 0 for none; 0 where a map is constant."""
    ranks = [_mean_ranks(one.flatten().double()) for one in (first, second)]
    a, b = (rank - rank.mean() for rank in ranks)
    scale = a.norm() * b.norm()
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def _mean_ranks(values: Tensor) -> Tensor:
    """Ranks in which equal values share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def _scores(model: Model, images: Sequence[Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
    found = []
    with evaluating(model):
        for start in range(0, len(images), BATCH):
            predictions = model.predict(torch.cat(list(images[start : start + BATCH])))
            each = (predictions[i : i + 1] for i in range(len(predictions.scores)))
            found += [counterparts(boxes, classes, one, whole_image=model.task.whole_image)[1].mean() for one in each]
    return torch.stack(found).float().cpu()


def _blurred(images: Tensor) -> Tensor:
    """A mean over a large square, three times, which is nearly a Gaussian; the border is repeated."""
    radius = max(int(min(images.shape[2:]) * BLUR_SHARE / 2), 1)
    for _ in range(3):
        images = F.avg_pool2d(F.pad(images, (radius,) * 4, mode="replicate"), 2 * radius + 1, 1)
    return images


def _area(curve: Tensor) -> float:
    return float(torch.trapezoid(curve) / max(len(curve) - 1, 1))
