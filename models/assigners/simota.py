"""YOLOv7's assignment: a box is assigned to those of its candidate places (by anchor shape) with the least cost.

SimOTA of YOLOX (arXiv 2107.08430, section 2.1) after OTA (arXiv 2103.14259), on the candidates of YOLOv5's rule. The cost of a candidate
for a box is the class loss (with √(class · objectness) as probability) plus 3 · −log IoU. A box gets as many candidates as the sum of its
ten (or twenty) best overlaps, at least one; a candidate of several boxes is assigned to the one of least cost.

Candidates can cost exactly the same: a place is listed once for every box that it fits. Which of them a box gets is left to torch.topk, as
in the published code. Its choice depends on how many it is asked for and among how many, so on the CPU the boxes whose last candidate costs
the same as the next are asked for again as there: for exactly their number, among exactly their image's candidates. On a GPU, whose topk
chooses differently anyway, it stays with the first answer.

Every box of an image is compared with every candidate of that image, so the number of pairs grows with the square of the boxes. They are
processed in chunks: the memory grows with the candidates only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.assigners.anchor_ratio import Matches, Scene, assign_by_ratio, decode_places
from models.assigners.places import gather_places
from models.assigners.targets import can_count_without_wait
from utils.iou import iou

MAX_PAIRS = 1 << 22  # pairs of boxes and candidates processed at once
CACHED_PAIRS = 1 << 18  # the same on a CPU, sized for its cache
MAX_LOGITS = 1 << 20  # class logits computed at once
IOU_WEIGHT = 3.0
SCANNED = 64  # a topk on a CPU scans rows of so many times its number, and padding behind a row does not change its choice; others it sorts
NARROW, WIDE = 0.5, 1.0  # how near a neighbouring cell must be: main branch, auxiliary branch


class _Candidates(NamedTuple):
    """Predictions of the main branch at C places of each image."""

    sides: Tensor  # (4, B, C) px: left, top, right, bottom
    logits: Tensor  # (B, nc, C) of √(class · objectness)
    background: Tensor  # (B, C) class loss of an unassigned candidate
    mask: Tensor  # (B, C) bool


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
        """Matches of a whole batch; those of an auxiliary branch come from a wider set of candidates, ranked by the main branch."""
        found = assign_by_ratio(scene, anchor_t=self.anchor_t, reach=WIDE if scene.auxiliary else NARROW).compact()
        (batch, n), places = scene.targets.valid.shape, found.place.shape[1]
        if n == 0 or places == 0:
            return found
        candidates = self._candidates(scene, found)
        topk = min(self.topk, places)
        picks = found.place.new_empty(batch, n, topk)
        taken = found.mask.new_empty(batch, n, topk)
        least = torch.full_like(candidates.background, torch.inf)
        owner = torch.zeros_like(found.box)
        counted = can_count_without_wait(least)
        for images, boxes in _pieces(batch, n, places, CACHED_PAIRS if counted else MAX_PAIRS):
            cost, overlap = self._cost(scene, candidates, images, boxes)  # (images, boxes, C)
            count = overlap.topk(topk, dim=-1).values.sum(dim=-1).int().clamp(min=1)
            value, candidate = cost.topk(min(topk + counted, places), dim=-1, largest=False)
            if counted:
                candidate = _as_published(cost, count, value, candidate, found.mask[images])
            taken[images, boxes] = (torch.arange(topk, device=cost.device) < count[..., None]) & value[..., :topk].isfinite()
            picks[images, boxes] = candidate[..., :topk]
            cheapest, box = cost.min(dim=1)
            owner[images] = torch.where(cheapest < least[images], box + boxes.start, owner[images])
            least[images] = torch.minimum(cheapest, least[images])
        return _assign_shared(picks.flatten(1), taken.flatten(1), owner, found, n)

    def _candidates(self, scene: Scene, found: Matches) -> _Candidates:
        """The main branch's predictions at the candidate places, computed in chunks."""
        boxes, logits = [], []
        for place in found.place.split(max(1, MAX_LOGITS // (self.nc * len(found.place))), dim=1):
            raw = gather_places(scene.maps, place, 5 + self.nc)  # (B, 5 + nc, c)
            boxes.append(decode_places(raw[:, :4], scene.grid, place))
            logits.append(torch.logit((raw[:, 5:].sigmoid() * raw[:, 4:5].sigmoid()).sqrt(), eps=1e-7))
        background = torch.cat([F.softplus(part).sum(dim=1) for part in logits], dim=1)
        return _Candidates(torch.cat(boxes, dim=1).permute(2, 0, 1).contiguous(), torch.cat(logits, dim=2), background, found.mask)

    def _cost(self, scene: Scene, candidates: _Candidates, images: slice, boxes: slice) -> tuple[Tensor, Tensor]:
        """Cost (infinite where box or candidate is padding) and overlap of some boxes with all candidates, (images, boxes, C)."""
        targets = scene.targets
        real = targets.valid[images, boxes, None] & candidates.mask[images, None]
        sides = candidates.sides[:, images, None].movedim(0, -1)
        overlap = iou(targets.boxes_xyxy[images, boxes, None], sides).mul_(real)
        labels = targets.labels[images, boxes]
        image = torch.arange(len(labels), device=labels.device)[:, None]
        cost = candidates.background[images, None] - candidates.logits[images][image, labels]
        cost -= (overlap + 1e-8).log_().mul_(IOU_WEIGHT)
        return cost.masked_fill_(~real, torch.inf), overlap


def _pieces(batch: int, n: int, candidates: int, pairs: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the images and of their n boxes with a bounded number of pairs of boxes and candidates (at least one box of one image)."""
    images = min(batch, max(1, pairs // candidates))
    boxes = max(1, pairs // (images * candidates))
    for image in range(0, batch, images):
        for box in range(0, n, boxes):
            yield slice(image, image + images), slice(box, box + boxes)


def _as_published(cost: Tensor, count: Tensor, value: Tensor, candidate: Tensor, mask: Tensor) -> Tensor:
    """The cheapest candidates of each box; where equal costs leave a choice, that of a topk of ``count`` among the image's own candidates.

    Args:
        cost: (images, boxes, C), infinite where box or candidate is padding.
        count: (images, boxes) how many each box gets.
        value: (images, boxes, k) the lowest costs, rising.
        candidate: (images, boxes, k) the candidates that cost them, equal ones in any order; changed in place.
        mask: (images, C) bool, which candidates are no padding.
    """
    last = value.gather(2, count[..., None].long() - 1).squeeze(2)
    following = F.pad(value, (0, 1), value=torch.inf).gather(2, count[..., None].long()).squeeze(2)
    image, box = ((last == following) & last.isfinite()).nonzero(as_tuple=True)
    number, length = count[image, box].long(), mask.sum(dim=1)[image]
    length = torch.where(length >= SCANNED * number, cost.shape[2], length)
    kinds = value.shape[2] + 1
    for alike in (length * kinds + number).unique().tolist():
        end, asked = divmod(alike, kinds)
        rows = ((length == end) & (number == asked)).nonzero()[:, 0]
        at = image[rows], box[rows]
        own = (~mask[at[0]]).to(torch.uint8).sort(dim=1, stable=True).indices[:, :end]
        least = cost[at].gather(1, own).topk(asked, dim=-1, largest=False).indices
        candidate[at[0], at[1], :asked] = own.gather(1, least)
    return candidate


def _assign_shared(candidate: Tensor, picked: Tensor, owner: Tensor, found: Matches, n: int) -> Matches:
    """The assigned candidates, each with one box.

    Args:
        candidate: (B, R) candidates, R / n a box, box by box.
        picked: (B, R) bool, whether it is assigned to the box.
        owner: (B, C) the box of least cost for each candidate.
        found: predictions at the candidates.
        n: boxes an image.
    """
    box = torch.arange(n, device=candidate.device).repeat_interleave(candidate.shape[1] // n).expand_as(candidate)
    first = torch.full_like(owner, n).scatter_reduce_(1, candidate, torch.where(picked, box, n), "amin")  # (B, C)
    last = torch.full_like(owner, -1).scatter_reduce_(1, candidate, torch.where(picked, box, -1), "amax")
    return Matches(found.place, torch.where(first < last, owner, first.clamp(max=n - 1)), last >= 0)
