"""The loss of keypoints: OKS of the assigned cells, whether each keypoint is labelled, and the likelihood of the errors.

YOLO-Pose, arXiv 2204.06806, section 3.5: 1 − OKS as a loss, and a binary cross entropy of the visibility. Residual Log-likelihood
Estimation, arXiv 2107.11291: the density of the errors, in units of a predicted σ, is a Laplace distribution times what a flow has learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.assigners.task_aligned import OverlapMeasure, TaskAlignedAssigner, spans_inside
from models.losses.terms import Assigned, BatchOfBranches, LossTerm
from tasks.keypoints import Keypoints
from utils.iou import ciou_terms
from utils.metrics.oks import BOX_TO_AREA, COCO_SIGMAS

FIELD, SIGMA = "keypoints", "keypoint_sigmas"  # names in HeadOutput.fields
VALUES_AT_ONCE = 1 << 24  # of pairs and keypoints
EPS = 1e-9
FEWEST_STRIDES, MOST_STRIDES = 2, 12  # of a cell's stride: sides of boxes that it is assigned to
LARGEST_ERROR = 100.0  # in units of σ
# Weights of the likelihood of COCO's keypoints: elbows, wrists, knees and ankles are harder to place.
COCO_WEIGHTS = (1.0,) * 7 + (1.2, 1.2, 1.5, 1.5) + (1.0, 1.0) + (1.2, 1.2, 1.5, 1.5)


class KeypointForm(NamedTuple):
    """How the channels x and y of a cell become a position: (scale · raw + offset) · stride from the cell's centre."""

    scale: float
    offset: float

    def positions(self, raw: Tensor, points: Tensor, strides: Tensor) -> Tensor:
        """Positions in px of raw channels (…, 2, N), cell centres (2, N) in px and strides (1, N)."""
        return (self.scale * raw + self.offset) * strides + points


COARSE = KeypointForm(2.0, -0.5)  # YOLOv8, YOLO11
FINE = KeypointForm(1.0, 0.0)  # YOLO26


class KeypointGains(NamedTuple):
    """Factors of the parts."""

    pose: float
    visibility: float
    likelihood: float


class KeypointTerm(LossTerm):
    """Keypoint loss, visibility loss and, with a flow, the negative log-likelihood of the errors.

    The keypoint loss is the mean over assigned cells, that of visibility the mean over their keypoints, the likelihood the mean over
    labelled keypoints; none is weighted with target scores.

    Args:
        keypoints: what they are.
        form: how channels become positions.
        gains: of the parts.
        flow: gives the log-density (n,) of errors (n, 2); None for no likelihood term.
    """

    def __init__(
        self, keypoints: Keypoints, form: KeypointForm, gains: KeypointGains, *, flow: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.keypoints, self.form, self.flow = keypoints, form, flow
        self.names = ("pose", "kobj", "rle") if flow else ("pose", "kobj")
        self.gains = tuple(gains)[: len(self.names)]
        self._variances = (2 * torch.tensor(keypoints.oks_sigmas)) ** 2
        self._weights = torch.tensor(COCO_WEIGHTS if keypoints.count == len(COCO_SIGMAS) else (1.0,) * keypoints.count)

    def __call__(self, predicted: BatchOfBranches, assigned: Assigned) -> tuple[Tensor, Tensor]:
        branches = len(predicted.fields)
        raw = predicted.field(FIELD)[assigned.place].unflatten(2, self.keypoints.shape)  # (K · B, R, K, D)
        centre, stride = predicted.grid.centres.T[assigned.picks.cell], predicted.grid.strides.T[assigned.picks.cell]  # (K · B, R, 2), 1
        found = self.form.positions(raw[..., :2], centre[:, :, None], stride[:, :, None])
        true = _true_keypoints(predicted)[assigned.number]  # (K · B, R, K, 3) px
        picked = assigned.picks.mask[..., None]
        labelled = (true[..., 2] != 0) & picked
        cells, labels = _sums(picked[..., 0], branches), _sums(labelled, branches)
        parts = [
            (_sums(self._distances(found, true, labelled, assigned), branches), cells),
            (_sums(self._visibility(raw, labelled, picked), branches), cells * self.keypoints.count),
        ]
        if self.flow is not None:
            sigma = predicted.field(SIGMA)[assigned.place].unflatten(2, (-1, 2)).sigmoid()
            error = (found - true[..., :2]) / stride[:, :, None]
            likelihood = _sums(self._likelihood(error, sigma, labelled), branches)
            parts.append((likelihood.clamp(min=0), labels))
        return tuple(torch.stack(column) for column in zip(*parts))  # type: ignore[return-value]

    def overlap_measure(self, predicted: BatchOfBranches, boxes_xyxy: Tensor) -> OverlapMeasure | None:
        return None

    def _distances(self, found: Tensor, true: Tensor, labelled: Tensor, assigned: Assigned) -> Tensor:
        """1 − OKS (K · B, R) of the labelled keypoints."""
        wh = assigned.true_xyxy[..., 2:] - assigned.true_xyxy[..., :2]
        variances = self._on(found)[0] * (wh.prod(dim=2, keepdim=True) + EPS) * 2
        lost = 1 - torch.exp(-(found - true[..., :2]).square().sum(dim=3) / variances)
        return (lost * labelled).sum(dim=2) / labelled.sum(dim=2).clamp(min=1)

    def _visibility(self, raw: Tensor, labelled: Tensor, picked: Tensor) -> Tensor:
        """Binary cross entropy (K · B, R, K) of the visibilities; zeros where keypoints have none."""
        if raw.shape[3] == 2:
            return raw[..., 0] * 0
        return F.binary_cross_entropy_with_logits(raw[..., 2], labelled.to(raw), reduction="none") * picked

    def _likelihood(self, error: Tensor, sigma: Tensor, labelled: Tensor) -> Tensor:
        """Negative log-likelihood (K · B, R, K) of errors in strides, weighted by keypoint."""
        assert self.flow is not None
        scaled = (error / sigma).clamp(-LARGEST_ERROR, LARGEST_ERROR) * labelled[..., None]
        density = self.flow(scaled.flatten(0, 2)).view(labelled.shape)
        laplace = torch.log(2 * sigma) + scaled.abs()
        loss = (torch.log(sigma) - density[..., None] + laplace).sum(dim=3)
        return loss * self._on(error)[1] * labelled

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Variances and weights of the keypoints on a device, where they stay."""
        if self._variances.device != like.device:
            self._variances, self._weights = (t.to(like.device, non_blocking=True) for t in (self._variances, self._weights))
        return self._variances, self._weights


class AssigningKeypointTerm(KeypointTerm):
    """The same, and the assignment goes by the keypoints too, as published with YOLO26.

    OKS takes the place of the overlap of boxes where an object has labelled keypoints, and a cell is a candidate only for boxes whose size
    suits its stride. The finest level takes all smaller, the coarsest all larger boxes; a box without any candidate keeps all cells.

    Args:
        keypoints: what they are.
        form: how channels become positions.
        gains: of the parts.
        flow: as of :class:`KeypointTerm`.
        min_candidate_side: as of :class:`TaskAlignedAssigner`.
    """

    def __init__(
        self, keypoints: Keypoints, form: KeypointForm, gains: KeypointGains, *, flow: Callable[[Tensor], Tensor] | None,
        min_candidate_side: float,
    ) -> None:  # fmt: skip
        super().__init__(keypoints, form, gains, flow=flow)
        self._assigner = TaskAlignedAssigner(min_candidate_side=min_candidate_side)

    @torch.no_grad()
    def overlap_measure(self, predicted: BatchOfBranches, boxes_xyxy: Tensor) -> OverlapMeasure | None:
        grid, boxes = predicted.grid, predicted.padded.boxes_xyxy.flatten(0, 1)  # (B · n, 4)
        raw = predicted.field(FIELD).unflatten(1, self.keypoints.shape)[..., :2]  # (K · B · N, K, 2)
        copies = len(raw) // grid.centres.shape[1]
        centre, stride = grid.centres.T.repeat(copies, 1)[:, None], grid.strides.T.repeat(copies, 1)[:, None]
        side = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).clamp(min=0).sqrt()
        true = _true_keypoints(predicted)
        levels = grid.strides.flatten()[grid.first.flatten()]  # (L,)
        suits = self._suitable(side, levels, self._assigner.area(ciou_terms(boxes)), predicted)
        level = torch.searchsorted(grid.first.flatten(), torch.arange(grid.centres.shape[1], device=boxes.device), right=True) - 1
        variances = self._on(raw)[0] * (2 * BOX_TO_AREA * side.square()[:, None] + EPS)
        return _KeypointOverlap(self.form.positions(raw, centre, stride), true, variances, suits, level)

    @staticmethod
    def _suitable(side: Tensor, levels: Tensor, area: Tensor, predicted: BatchOfBranches) -> Tensor:
        """Whether cells of each level may be assigned to each box, (B · n, L)."""
        low, high = FEWEST_STRIDES * levels, MOST_STRIDES * levels
        low, high = low.masked_fill(levels == levels.min(), 0.0), high.masked_fill(levels == levels.max(), torch.inf)
        suits = (side[:, None] >= low) & (side[:, None] <= high)
        _, counts = spans_inside(area, predicted.grid)  # (2, L, B · n)
        return suits | ~(suits & (counts.prod(dim=0).T > 0)).any(dim=1, keepdim=True)


class _KeypointOverlap:
    """OKS of pairs in place of the overlap of their boxes, and 0 for cells of other levels.

    Args:
        found: (K · B · N, K, 2) px, predicted.
        true: (B · n, K, 3) px.
        variances: (B · n, K) twice the area times (2σ)².
        suits: (B · n, L) whether a level's cells may be assigned.
        level: (N,) of each cell.
    """

    def __init__(self, found: Tensor, true: Tensor, variances: Tensor, suits: Tensor, level: Tensor) -> None:
        self.found, self.true, self.variances, self.suits, self.level = found, true, variances, suits, level
        self.labelled = true[..., 2] != 0

    def __call__(self, overlap: Tensor, *, place: Tensor, number: Tensor) -> Tensor:
        count = self.found.shape[1]
        step = max(1, VALUES_AT_ONCE // max(overlap.numel(), 1))
        total = torch.zeros_like(overlap)
        for k in range(0, count, step):
            part = slice(k, k + step)
            away = (self.found[:, part][place] - self.true[:, part, :2][number]).square().sum(dim=-1)
            total += (torch.exp(-away / self.variances[:, part][number]) * self.labelled[:, part][number]).sum(dim=-1)
        labelled = self.labelled.sum(dim=1)[number]
        measured = torch.where(labelled > 0, total / labelled.clamp(min=1), overlap)
        level = self.level[place % len(self.level)]
        return measured * self.suits.flatten()[number * self.suits.shape[1] + level]


def _true_keypoints(predicted: BatchOfBranches) -> Tensor:
    """The keypoints (B · n, K, 3) of each place for a box, in px, those of no box unlabelled."""
    targets, valid = predicted.targets, predicted.padded.valid
    assert targets.keypoints is not None
    h, w = predicted.hw_px
    size = targets.keypoints.new_ones(3)  # filled on the device: the host would wait for a copy
    size[0:1], size[1:2] = w, h
    table = F.pad(targets.keypoints * size, (0, 0, 0, 0, 0, 1))  # (M + 1, K, 3), at least one row
    return table[predicted.target_row().flatten()] * valid.flatten()[:, None, None]


def _sums(values: Tensor, branches: int) -> Tensor:
    """Sums (K,) over each branch's images and all that follows."""
    return values.reshape(branches, -1).sum(dim=1).float()
