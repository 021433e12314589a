"""Files of networks with a one-to-one branch: one output (B, 300, 6) of detections, best score first, without suppression."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.analysis.compare import PredictionDifference, absolute_difference
from models.model import Model
from utils.errors import UserError
from utils.nms import MOST_UNIQUE, select_best
from utils.types import Predictions

ROWS = MOST_UNIQUE  # of the output, whatever the image shows and however small it is
COLUMNS = 6  # x1, y1, x2, y2 in px, score, class; then what a task adds to a detection
OUTPUTS = {"output0": {0: "batch"}}  # name -> free axes


class OneToOneNetwork(nn.Module):
    """A deployed Model whose main branch is one-to-one, and its best predictions as rows.

    Args:
        detector: already deployed.
    """

    def __init__(self, detector: Model) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        """(B, ch, H, W) in 0-1 to (B, ROWS, COLUMNS + ·); rows behind the last candidate are zero."""
        predictions = self.detector.head.decode(self.detector(images))
        if extra := [*predictions.shared, *list(predictions.fields)[1:]]:
            task = self.detector.task.name
            raise UserError(f"a file of a one-to-one branch keeps detections only, but the task {task!r} has also {', '.join(extra)}")
        boxes = F.pad(predictions.boxes, (0, 0, 0, ROWS))  # so that there are as many candidates as rows at any size
        scores = F.pad(predictions.scores, (0, 0, 0, ROWS))
        found = select_best(scores, count=ROWS)
        chosen = boxes.gather(1, found.candidate[..., None].expand(-1, -1, 4))
        parts = [chosen, found.scores[..., None], found.classes[..., None].to(chosen.dtype)]
        for values in predictions.fields.values():
            values = F.pad(values, (0, 0, 0, ROWS))
            parts.append(values.gather(1, found.candidate[..., None].expand(-1, -1, values.shape[2])))
        rows = torch.cat(parts, dim=2)
        as_many = F.pad(torch.ones_like(predictions.scores[0, :, 0]), (0, ROWS))[:ROWS]  # as there are candidates, as without padding
        return rows * as_many[:, None]


def decode_rows(rows: Tensor, *, nc: int, field: str = "") -> Predictions:
    """Rows (B, K, 6) as predictions that need no suppression; the scores of other classes are zero.

    Args:
        rows: with what the task adds behind the six.
        nc: number of classes.
        field: name of what the task adds; empty for nothing.

    Raises:
        ValueError: another shape.
    """
    if rows.ndim != 3 or rows.shape[2] < COLUMNS + bool(field) or (rows.shape[2] > COLUMNS and not field):
        wanted = f"more than {COLUMNS}" if field else str(COLUMNS)
        raise ValueError(f"one output (batch, detections, {wanted}) is needed")
    boxes, best, classes, added = rows.float().split((4, 1, 1, rows.shape[2] - COLUMNS), dim=2)
    scores = best.new_zeros(*rows.shape[:2], nc).scatter_(2, classes.long().clamp(0, nc - 1), best)
    return Predictions(boxes, scores, {field: added} if field else {}, unique=True)


def selection_difference(candidates: Predictions, got: Predictions) -> PredictionDifference:
    """How far detections are from the best of torch's candidates.

    Scores are compared rank by rank, and each detection with the candidate that is nearest in place and score, since of equal scores
    either may be chosen.

    Args:
        candidates: of the network, all of them.
        got: of the file, from :func:`decode_rows`.
    """
    ranked = F.pad(select_best(candidates.scores, count=ROWS).scores, (0, ROWS))[:, :ROWS]
    scores = absolute_difference(ranked, got.scores.amax(dim=2))
    worst = 0.0
    for boxes, per_class, found, best in zip(candidates.boxes, candidates.scores, got.boxes, got.scores):
        valid = best.amax(dim=1) > 0
        score, label = best[valid].max(dim=1)
        px = (found[valid][:, None] - boxes[None]).abs().amax(dim=2)  # (K, N)
        cost = px + (score[:, None] - per_class.T[label]).abs()
        worst = max(worst, float(cost.nan_to_num(nan=torch.inf).amin(dim=1).max()) if len(cost) else 0.0)
    return PredictionDifference(worst, scores)
