"""YOLOv5's autoanchor: checks how well anchors fit a dataset and finds better ones by k-means on the box sizes and random mutation.

A box fits an anchor if neither side differs by more than the factor ``anchor_t``, as in the assignment. With r the smaller of the two
ratios w/w_a, w_a/w, h/h_a, h_a/h, the fitness of a set of anchors is the mean over the boxes of the best r, boxes that fit no anchor
count as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.errors import UserError

ENOUGH_RECALL = 0.98  # best possible recall from which anchors are kept
GUESSED_SIDE = 3.0  # strides; side of a level's first anchor before the boxes are known
LEAST_SIDE = 2.0  # px; boxes with both sides below it are left out
MOST_BOXES = 20_000  # larger datasets are subsampled at random, with no visible effect on the result
MUTATED, MUTATION_SCALE, MUTATION_RANGE = 0.9, 0.1, (0.3, 3.0)  # share of changed sides, standard deviation, limits of the factor


class AnchorFit(NamedTuple):
    """The fit of anchors to boxes."""

    recall: float  # best possible recall: the share of boxes that fit an anchor
    anchors_a_box: float  # anchors that a box fits, on average
    fitness: float


def sizes_in_training(wh: Tensor, image_wh: Tensor, imgsz: int) -> Tensor:
    """Sizes of boxes (M, 2), normalised, on images (M, 2) px whose longer side is scaled to ``imgsz``: (M, 2) px."""
    return wh * image_wh * (imgsz / image_wh.amax(dim=1, keepdim=True))


def anchor_fit(wh_px: Tensor, anchors_px: Tensor, *, anchor_t: float = 4.0) -> AnchorFit:
    """The fit of anchors (..., 2) to boxes of sizes (M, 2), px; all zero without boxes."""
    if not len(wh_px):
        return AnchorFit(0.0, 0.0, 0.0)
    r = _ratios(wh_px, anchors_px.reshape(-1, 2))
    best, fits = r.amax(dim=1), r > 1 / anchor_t
    return AnchorFit(float(fits.any(dim=1).float().mean()), float(fits.sum(dim=1).float().mean()), float(_fitness(best, anchor_t)))


def about(wh_px: Tensor, anchors_px: Tensor, anchor_t: float) -> str:
    """The fit of anchors in words."""
    fit = anchor_fit(wh_px.float().cpu(), anchors_px.float().cpu(), anchor_t=anchor_t)
    return f"{fit.anchors_a_box:.2f} anchors a box, best possible recall {fit.recall:.4f}"


def guessed_anchors(per_cell: int, strides: Sequence[float]) -> Tensor:
    """Anchors (levels, per cell, 2) px to start from before the boxes are known.

    The j-th of k on a level of stride s covers (3 · 2^(j / k) · s)² px², so that the levels of a pyramid form one geometric series of
    sizes; its width is 1, ½ or 2 times its height in turn.
    """
    j = torch.arange(per_cell)
    side = GUESSED_SIDE * 2 ** (j / per_cell)
    stretch = torch.tensor((1.0, 0.5, 2.0))[j % 3].sqrt()
    return torch.stack((side * stretch, side / stretch), dim=1) * torch.tensor(strides, dtype=torch.float32).view(-1, 1, 1)


def better_anchors(
    wh_px: Tensor, anchors_px: Tensor, *, anchor_t: float = 4.0, generations: int = 1000, seed: int = 0, guessed: bool = False
) -> tuple[Tensor, str]:
    """The given anchors if they fit the boxes, else new ones, and a line for the log with the reason.

    Args:
        wh_px: (M, 2) sizes of the training boxes at the training size.
        anchors_px: (levels, anchors a cell, 2).
        anchor_t: largest ratio of sides.
        generations: number of mutations.
        seed: of k-means and mutation.
        guessed: whether the given anchors are only :func:`guessed_anchors`; then new ones are used unless they are worse.

    Returns:
        (levels, anchors a cell, 2) px, ascending by area over the levels if they are new; and the line.
    """
    wh_px = wh_px.float().cpu()
    now = anchor_fit(wh_px, anchors_px.float().cpu(), anchor_t=anchor_t)
    kept = f"anchors: {'the first guess is kept' if guessed else 'kept'} ({about(wh_px, anchors_px, anchor_t)})"
    if not len(wh_px) or (now.recall >= ENOUGH_RECALL and not guessed):
        return anchors_px, kept
    count = anchors_px.shape[0] * anchors_px.shape[1]
    try:
        found = find_anchors(wh_px, count, anchor_t=anchor_t, generations=generations, seed=seed)
    except UserError as error:
        return anchors_px, f"{kept}; {error}"
    new = anchor_fit(wh_px, found, anchor_t=anchor_t)
    if new.recall < now.recall or (new.recall == now.recall and not guessed):
        return anchors_px, f"{kept}; new ones reach no more than {new.recall:.4f}"
    sizes = ", ".join(f"{w:.0f},{h:.0f}" for w, h in found.tolist())
    fit = about(wh_px, found, anchor_t)
    done = f"fitted to the data ({fit})" if guessed else f"replaced ({about(wh_px, anchors_px, anchor_t)}; now {new.recall:.4f})"
    return found.view_as(anchors_px).to(anchors_px), f"anchors: {done}{':' if guessed else ' by'} {sizes} px"


def find_anchors(wh_px: Tensor, count: int, *, anchor_t: float = 4.0, generations: int = 1000, seed: int = 0) -> Tensor:
    """Anchors (count, 2) px for boxes of sizes (M, 2) px, ascending by area.

    Raises:
        UserError: fewer boxes than anchors.
    """
    g = torch.Generator().manual_seed(seed)
    wh = wh_px.float()[(wh_px >= LEAST_SIDE).any(dim=1)]
    if len(wh) > MOST_BOXES:
        wh = wh[torch.randperm(len(wh), generator=g)[:MOST_BOXES]]
    if len(wh) < count:
        raise UserError(f"{len(wh)} boxes of at least {LEAST_SIDE:g} px are too few for {count} anchors")
    anchors = _evolve(_k_means(wh, count, g), wh, anchor_t, generations, g)
    return anchors[anchors.prod(dim=1).argsort()]


def _ratios(wh: Tensor, anchors: Tensor) -> Tensor:
    """The smaller side ratio r of all pairs: (M, 2), (K, 2) to (M, K)."""
    ratio = wh[:, None] / anchors
    return torch.minimum(ratio, 1 / ratio).amin(dim=2)


def _fitness(best: Tensor, anchor_t: float) -> Tensor:
    return (best * (best > 1 / anchor_t)).mean()


def _k_means(wh: Tensor, count: int, g: torch.Generator, *, rounds: int = 30) -> Tensor:
    """Centres (count, 2) of the sizes, each side in units of its deviation; seeded far apart (k-means++)."""
    scale = wh.std(dim=0).clamp(min=1e-6)
    points = wh / scale
    centres = points[torch.randint(len(points), (1,), generator=g)]
    for _ in range(count - 1):
        distance2 = torch.cdist(points, centres).amin(dim=1) ** 2 + 1e-12
        centres = torch.cat((centres, points[torch.multinomial(distance2, 1, generator=g)]))
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        number = torch.bincount(nearest, minlength=count)[:, None]
        mean = torch.zeros_like(centres).index_add_(0, nearest, points) / number.clamp(min=1)
        centres = torch.where(number > 0, mean, centres)
    return centres * scale


def _evolve(anchors: Tensor, wh: Tensor, anchor_t: float, generations: int, g: torch.Generator) -> Tensor:
    """The best of ``generations`` random changes of the anchors, each made from the best so far."""
    best = _fitness(_ratios(wh, anchors).amax(dim=1), anchor_t)
    for _ in range(generations):
        changed = torch.rand(anchors.shape, generator=g) < MUTATED
        noise = torch.randn(anchors.shape, generator=g) * torch.rand(1, generator=g) * MUTATION_SCALE
        mutant = (anchors * (1 + changed * noise).clamp(*MUTATION_RANGE)).clamp(min=LEAST_SIDE)
        fitness = _fitness(_ratios(wh, mutant).amax(dim=1), anchor_t)
        if fitness > best:
            best, anchors = fitness, mutant
    return anchors
