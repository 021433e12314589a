"""YOLOv7's assignment: of the places whose anchors fit a box, those that predict it best at the least cost learn it.

SimOTA of YOLOX (arXiv 2107.08430, section 2.1) after OTA (arXiv 2103.14259), on the candidates of YOLOv5's rule. The cost of a candidate
for a box is the class loss (with √(class · objectness) as probability) plus 3 · −log IoU. A box takes as many candidates as its ten (or
twenty) best overlaps sum to, at least one; a candidate that several boxes take goes to the box of least cost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.assigners.anchor_ratio import Matches, Scene, assign_by_ratio, decode_places
from models.assigners.places import gather_places
from utils.iou import iou

MAX_PAIRS = 1 << 20  # pairs of boxes and candidates that are looked at together
IOU_WEIGHT = 3.0
NARROW, WIDE = 0.5, 1.0  # how near a neighbouring cell must be: main branch, auxiliary branch


class SimOTA:
    """Assigns boxes to places of an anchor-based head.

    Args:
        nc: number of classes.
        anchor_t: largest ratio of a box's side and the anchor's.
        topk: overlaps that are summed.
    """

    def __init__(self, *, nc: int, anchor_t: float = 4.0, topk: int = 10) -> None:
        self.nc, self.anchor_t, self.topk = nc, anchor_t, topk

    @torch.no_grad()
    def __call__(self, scene: Scene) -> Matches:
        """Matches of a whole batch; those of an auxiliary branch come from a wider set of candidates, judged by the main branch."""
        found = assign_by_ratio(scene, anchor_t=self.anchor_t, reach=WIDE if scene.auxiliary else NARROW).compact()
        (batch, n), candidates = scene.targets.valid.shape, found.place.shape[1]
        if n == 0 or candidates == 0:
            return found
        raw = gather_places(scene.maps, found.place, 5 + self.nc)  # (B, 5 + nc, C)
        boxes = decode_places(raw[:, :4], scene.grid, found.place)
        logits = torch.logit((raw[:, 5:].sigmoid() * raw[:, 4:5].sigmoid()).sqrt(), eps=1e-7)  # (B, nc, C)
        step = max(1, MAX_PAIRS // (batch * candidates))
        picks, least, owner = [], torch.full_like(boxes[..., 0], torch.inf), torch.zeros_like(found.box)
        for start in range(0, n, step):
            part = slice(start, start + step)
            cost, overlap = self._cost(scene, part, found.mask, boxes, logits)  # (B, part, C)
            cheapest, box = cost.min(dim=1)
            owner = torch.where(cheapest < least, box + start, owner)
            least = torch.minimum(cheapest, least)
            picks.append(self._pick(cost, overlap))
        candidate, picked = (torch.cat(p, dim=1).flatten(1) for p in zip(*picks))  # (B, n * topk)
        return _settle(candidate, picked, owner, found, n)

    def _cost(self, scene: Scene, part: slice, mask: Tensor, boxes: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Cost (infinite where box or candidate is none) and overlap of some boxes with all candidates, (B, n, C)."""
        image = torch.arange(len(boxes), device=boxes.device)[:, None]
        real = scene.targets.valid[:, part, None] & mask[:, None]
        overlap = iou(scene.targets.boxes_xyxy[:, part, None], boxes[:, None]) * real
        classes = F.softplus(logits).sum(dim=1)[:, None] - logits[image, scene.targets.labels[:, part]]
        cost = classes - IOU_WEIGHT * torch.log(overlap + 1e-8)
        return torch.where(real, cost, torch.inf), overlap

    def _pick(self, cost: Tensor, overlap: Tensor) -> tuple[Tensor, Tensor]:
        """The cheapest candidates of each box (B, n, topk), and which of them it takes."""
        topk = min(self.topk, cost.shape[2])
        count = overlap.topk(topk, dim=-1).values.sum(dim=-1).int().clamp(min=1)
        value, candidate = cost.topk(topk, dim=-1, largest=False)
        taken = (torch.arange(topk, device=cost.device) < count[..., None]) & value.isfinite()
        return candidate, taken


def _settle(candidate: Tensor, picked: Tensor, owner: Tensor, found: Matches, n: int) -> Matches:
    """The candidates that were taken, each by one box.

    Args:
        candidate: (B, R) candidates, R / n a box, box by box.
        picked: (B, R) bool, whether the box takes it.
        owner: (B, C) the box of least cost for each candidate.
        found: the candidates.
        n: boxes an image.
    """
    box = torch.arange(n, device=candidate.device).repeat_interleave(candidate.shape[1] // n).expand_as(candidate)
    first = torch.full_like(owner, n).scatter_reduce_(1, candidate, torch.where(picked, box, n), "amin")  # (B, C)
    last = torch.full_like(owner, -1).scatter_reduce_(1, candidate, torch.where(picked, box, -1), "amax")
    return Matches(found.place, torch.where(first < last, owner, first.clamp(max=n - 1)), last >= 0)
